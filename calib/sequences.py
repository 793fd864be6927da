"""Whole sequences of q, k and v of a layer, for estimators that look at attention itself."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

NUM_SEQUENCES = 4
SEQUENCE_LEN = 512


@dataclass
class LayerSequences:
    """The beginnings of some sequences of one layer: q `[seq, h_q, d]`, k and v `[seq, h_kv, d]`, fp32, on the CPU.

    softmax_scale, window: of the layer's attention; window None: all earlier tokens are seen.
    """

    softmax_scale: float | None = None
    window: int | None = None
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)

    def log_weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Log attention weights `[h_kv, group, queries, keys]` of one sequence; -inf for keys that are not seen."""
        return log_weights(q, k, self.softmax_scale, self.window)


def log_weights(q: Tensor, k: Tensor, softmax_scale: float | None, window: int | None) -> Tensor:
    """Log attention weights `[h_kv, group, queries, keys]` of q `[seq, h_q, d]` over k `[seq, h_kv, d]`.

    -inf for keys that are not seen; softmax_scale, window: as `LayerSequences` has them.
    """
    length, h_q, d = q.shape
    h_kv = k.shape[1]
    scale = 1 / math.sqrt(d) if softmax_scale is None else softmax_scale
    logits = torch.einsum("qhgd,khd->hgqk", q.view(length, h_kv, h_q // h_kv, d), k) * scale
    place = torch.arange(length, device=q.device)
    distance = place[:, None] - place
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return logits.masked_fill(~seen, -torch.inf).log_softmax(-1)


class SequenceSample:
    """Keeps the sequences with the numbers `wanted` of a stream of batches, their first `length` tokens."""

    def __init__(self, wanted: Collection[int], length: int = SEQUENCE_LEN) -> None:
        self.layers: dict[int, LayerSequences] = {}
        self._wanted = set(wanted)
        self._length = length
        self._rows: list[int] = []

    @classmethod
    def spread(cls, num_sequences: int, count: int = NUM_SEQUENCES) -> SequenceSample:
        """`count` sequences, spread evenly over `num_sequences`."""
        count = min(count, num_sequences)
        return cls({idx * num_sequences // count for idx in range(count)})

    def advance(self, first: int, batch: int) -> None:
        """The next batch holds sequences `first` .. first + batch - 1."""
        self._rows = [idx - first for idx in sorted(self._wanted) if first <= idx < first + batch]

    def update(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> None:
        """Take in q `[batch, h_q, seq, d]`, k and v `[batch, h_kv, seq, d]` of a layer."""
        layer = self.layers.setdefault(layer_idx, LayerSequences(scale, window))
        for row in self._rows:
            for kept, part in ((layer.q, q), (layer.k, k), (layer.v, v)):
                kept.append(part[row, :, : self._length].transpose(0, 1).float().cpu().clone())
