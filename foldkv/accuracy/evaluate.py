"""Feed windows of tokens through caches and compare the logits: windows outside, caches inside.

A way of exercising a cache is how many tokens are appended at once: the whole window (every query then attends to K and
V that have been through the cache already, as the append comes before the attention), or one token after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .metrics import TokenScores, compare
from .sources import CacheSource, NewCache, StockSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE_BYTES = 1 << 29
"""Most bytes of base logits kept at once; decides how many windows make a batch."""

SPLIT = 100
"""Tokens appended at once in the noise floor's other split of a prefill: no multiple of a page or a chunk."""

OnResult = Callable[[str, str, TokenScores], None]


@dataclass(frozen=True)
class Way:
    """A way of exercising the cache.

    windows, length: how much text, the first `length` tokens of the first `windows` windows. chunk: tokens appended at
    once. other_chunk: the same for the noise floor's run of the base with another split.
    """

    name: str
    windows: int
    length: int
    chunk: int
    other_chunk: int

    @property
    def tokens(self) -> int:
        return self.windows * self.length


def make_ways(num_windows: int, window_len: int, decode_windows: int, decode_len: int) -> list[Way]:
    """Prefill through the cache and teacher-forced decode; a way with no windows is left out."""
    ways = [
        Way("prefill", num_windows, window_len, window_len, min(SPLIT, -(-window_len // 2))),
        Way("decode", decode_windows, decode_len, 1, decode_len),
    ]
    return [way for way in ways if way.windows > 0]


@dataclass(frozen=True)
class Run:
    """One cache fed one way: `chunk` tokens at once."""

    name: str
    source: CacheSource
    chunk: int


def make_runs(way: Way, base: CacheSource, sources: Sequence[CacheSource]) -> list[Run]:
    """The runs compared with the base: each source, then the two of the noise floor, named "noise.*"."""
    runs = [Run(source.name, source, way.chunk) for source in sources]
    return [*runs, Run("noise.split", base, way.other_chunk), Run("noise.stock", StockSource(), way.chunk)]


def total_tokens(ways: Sequence[Way], num_sources: int) -> int:
    """Tokens that `evaluate` feeds in all: what its `advance` adds up to."""
    return sum(way.tokens for way in ways) * (num_sources + 3)


def feed(model: PreTrainedModel, new_cache: NewCache, ids: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """Run ids `[windows, length]` through a fresh cache, `chunk` tokens at once.

    Yields (first position, logits `[windows, n, vocab]`) in the model's dtype.
    """
    cache: Any = new_cache(*ids.shape)
    for begin in range(0, ids.shape[1], chunk):
        part = ids[:, begin : begin + chunk]
        yield begin, model(part, past_key_values=cache, use_cache=True).logits


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    ids: Tensor,
    way: Way,
    base: CacheSource,
    sources: Sequence[CacheSource],
    *,
    advance: Callable[[int], object] = lambda tokens: None,
    on_result: OnResult = lambda way, run, scores: None,
) -> dict[str, TokenScores]:
    """The scores of every run of one way, by name: positions 0 .. length - 2, each predicting the token after it.

    ids: int64 `[windows, length]`. advance is called with the tokens fed since the last call, on_result as a run ends.
    Base logits are kept for one batch of windows, which `BASE_BYTES` bounds.
    """
    device, vocab = model.device, model.config.get_text_config(decoder=True).vocab_size
    ids = ids[: way.windows, : way.length]
    runs = make_runs(way, base, sources)
    scores: dict[str, list[TokenScores]] = {run.name: [] for run in runs}
    batches = ids.split(max(1, BASE_BYTES // (4 * vocab * way.length)))
    for number, batch in enumerate(batches, 1):
        batch = batch.to(device)
        with base.open(model) as new_cache:
            logits = []
            for _, part in feed(model, new_cache, batch, way.chunk):
                logits.append(part)
                advance(part.shape[0] * part.shape[1])
        base_logits = torch.cat(logits, dim=1)
        del logits
        for run in runs:
            parts = []
            with run.source.open(model) as new_cache:
                for begin, part in feed(model, new_cache, batch, run.chunk):
                    advance(part.shape[0] * part.shape[1])
                    end = min(begin + part.shape[1], way.length - 1)
                    if end > begin:
                        next_tokens = batch[:, begin + 1 : end + 1]
                        parts.append(compare(base_logits[:, begin:end], part[:, : end - begin], next_tokens))
            scores[run.name].append(TokenScores.cat(parts, dim=1))
            if number == len(batches):
                on_result(way.name, run.name, TokenScores.cat(scores[run.name], dim=0))
    return {name: TokenScores.cat(parts, dim=0) for name, parts in scores.items()}
