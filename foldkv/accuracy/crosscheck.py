"""Is it really this mode's cache? A swapped model's logits against those that the reference gives for the same formats.

The reference quantises and dequantises K and V in plain PyTorch inside a stock model (`emulate`): it shares the formats and
the scales with the swap, and neither the ops nor the pages nor the plan. A cache that was not written, not read, written
with other scales, in another order of heads or for other lengths gives other logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .evaluate import Way, feed
from .metrics import compare
from .sources import CacheSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS, LENGTH, STEPS = 2, 288, 40
"""Of the text that is compared: past a chunk of keys (256) and a few pages; steps decoded at its end, one by one."""


@dataclass(frozen=True)
class CrossCheck:
    """One source, one way. kld: mean KLD of the source from its reference; own_kld: of the reference from the base's.

    noise: mean KLD of the 16-bit base from its own reference, the same way: what rounding alone does in this model.
    ratio: the source's KLD from the base's reference over its reference's, same positions. None in older reports.
    """

    kld: float
    own_kld: float
    noise: float
    ratio: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def cross_check(
    model: PreTrainedModel, base: CacheSource, sources: Sequence[CacheSource], ways: Sequence[Way], ids: Tensor
) -> dict[str, dict[str, CrossCheck]]:
    """Source -> way -> what came of it; sources without a reference are left out, all where the base has none.

    ids: int64 `[windows, length]`; every way feeds the same beginnings, so that a decode too passes a chunk of keys.
    """
    base_reference = base.reference()
    if base_reference is None:
        return {}
    ids = ids[:WINDOWS, :LENGTH].to(model.device)
    truth = _run(model, base_reference, ids)
    noise = {way.name: _kld(truth, _through(model, base, way, ids), ids) for way in ways}
    result: dict[str, dict[str, CrossCheck]] = {}
    for source in sources:
        reference = source.reference()
        if reference is None:
            continue
        wanted = _run(model, reference, ids)
        own = _kld(truth, (0, wanted), ids)
        result[source.name] = {}
        for way in ways:
            got = _through(model, source, way, ids)
            ratio = _kld(truth, got, ids) / max(_kld(truth, (got[0], wanted[:, got[0] :]), ids), 1e-30)
            result[source.name][way.name] = CrossCheck(_kld(wanted, got, ids), own, noise[way.name], ratio)
    return result


def _run(model: PreTrainedModel, source: CacheSource, ids: Tensor) -> Tensor:
    with source.open(model) as new_cache:
        return next(feed(model, new_cache, ids, ids.shape[1]))[1]


def _through(model: PreTrainedModel, source: CacheSource, way: Way, ids: Tensor) -> tuple[int, Tensor]:
    """First position and logits of a source fed the way's way; of a decode the last `STEPS` positions alone."""
    with source.open(model) as new_cache:
        if way.chunk > 1:
            parts = list(feed(model, new_cache, ids, min(way.chunk, ids.shape[1])))
            return 0, torch.cat([logits for _, logits in parts], dim=1)
        prefill = max(1, ids.shape[1] - STEPS)
        if way.graphs and source.kernels:
            steps = source.decode(model, ids, prefill)
        else:
            steps = _decode(model, new_cache(*ids.shape), ids, prefill)
        return prefill - 1, torch.cat([logits.clone() for _, logits in steps], dim=1)


def _decode(model: PreTrainedModel, cache: Any, ids: Tensor, prefill: int) -> Iterator[tuple[int, Tensor]]:
    """`prefill` tokens at once, then one by one; yields (position, logits `[windows, 1, vocab]`)."""
    for part in chain([ids[:, :prefill]], ids[:, prefill:].split(1, dim=1)):
        yield 0, model(part, past_key_values=cache, use_cache=True).logits[:, -1:]


def _kld(wanted: Tensor, got: tuple[int, Tensor], ids: Tensor) -> float:
    begin, logits = got
    span = slice(begin, begin + logits.shape[1])
    return float(compare(wanted[:, span], logits, ids[:, span]).kld.mean())
