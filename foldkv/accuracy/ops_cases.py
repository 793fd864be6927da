"""What the ops are measured on: shapes, and K, V and queries of several kinds, synthetic and out of a real model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calib.observers import LayerObserver, TokenSample
from quant.scales import KVScales

from .emulate import emulated_attention, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """h_kv kv heads with `group` query heads each, of d channels, in pages of page_size tokens."""

    h_kv: int
    group: int
    d: int
    page_size: int

    def __str__(self) -> str:
        return f"{self.h_kv} x {self.group} heads of {self.d}, pages of {self.page_size}"


SHAPES = (Shape(2, 4, 128, 64), Shape(1, 7, 64, 16), Shape(4, 1, 128, 32), Shape(2, 8, 96, 128))
"""The first ones are measured first; levels take 1, 2 and all of them."""


@dataclass(frozen=True)
class Data:
    """fp32 rows of one sequence a first dimension: q `[n, tokens, h_q, d]`, k and v `[n, tokens, h_kv, d]`.

    scales: statistics and ranges that the modes take their parameters from, and the layer to look under.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    scales: KVScales
    layer: int = 0


def fitted(k: Tensor, v: Tensor, q: Tensor) -> KVScales:
    """Scales calibrated on these very rows, `[tokens, heads, d]` each."""
    observer = LayerObserver(0, k, v, min(len(k), 4096))
    sample = TokenSample(min(len(k), 4096), seed=0)
    sample.advance(len(k))
    observer.update(q, k, v, sample)
    return KVScales([observer.finish()], {})


def _gaussian(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng)


def _heavy(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    return _gaussian(shape, rng) / (_gaussian((*shape, 3), rng).square().mean(-1)).sqrt().clamp_min(0.05)


def _outliers(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Two channels of each head 20 times as large, four with an offset of 10 deviations: what K looks like under RoPE."""
    x = _gaussian(shape, rng)
    x[..., 3::64] *= 20
    x[..., 5::32] += 10
    return x


def _constant(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Every third token's row one value throughout, every seventh zero."""
    x = _gaussian(shape, rng)
    x[:, ::3] = x[:, ::3, :, :1]
    x[:, ::7] = 0
    return x


SYNTHETIC: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "heavy tails": _heavy,
    "channel outliers": _outliers,
    "constant rows": _constant,
    "tiny": lambda shape, rng: _gaussian(shape, rng) * 1e-3,
    "huge": lambda shape, rng: _gaussian(shape, rng) * 1e3,
}


def synthetic(name: str, shape: Shape, sequences: int, tokens: int) -> Data:
    """Rows of one kind. Queries are scaled so that the logits of K vary by about 2, whatever K's size."""
    rng = torch.Generator().manual_seed(1 + list(SYNTHETIC).index(name))
    make = SYNTHETIC[name]
    k, v = (make((sequences, tokens, shape.h_kv, shape.d), rng) for _ in range(2))
    q = torch.randn(sequences, tokens, shape.h_kv * shape.group, shape.d, generator=rng)
    spread = (k - k.mean((0, 1))).square().mean((0, 1)).sqrt().clamp_min(1e-12)  # [h_kv, d]
    q = 2 * q / spread.repeat_interleave(shape.group, 0)
    return Data(name, q, k, v, fitted(*(x.flatten(0, 1) for x in (k, v, q))))


@torch.inference_mode()
def captured(model: PreTrainedModel, ids: Tensor, scales: KVScales) -> list[Data]:
    """Queries, keys and values that attention was given in the first, middle and last caching layers.

    ids: int64 `[sequences, tokens]`.
    """
    own = [i for i, layer in enumerate(scales.layers) if layer is not None]
    wanted = sorted({own[0], own[len(own) // 2], own[-1]})
    kept: dict[int, list[list[Tensor]]] = {layer: [] for layer in wanted}

    def tap(layer_idx: int, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
        if layer_idx in kept:
            kept[layer_idx].append([rows_of(x).cpu() for x in (q, k, v)])

    with emulated_attention(model, tap):
        for row in ids:
            model(row[None].to(model.device), use_cache=False)
    found = []
    for layer, rows in kept.items():
        q, k, v = (torch.stack(part) for part in zip(*rows, strict=True))
        found.append(Data(f"model, layer {layer}", q, k, v, scales, layer))
    return found


def shape_of(data: Data, page_size: int = 64) -> Shape:
    """The shape that rows of a model have."""
    h_kv = data.k.shape[2]
    return Shape(h_kv, data.q.shape[2] // h_kv, data.k.shape[3], page_size)
