"""What calibration statistics say about a model, per layer and head: ranges, outlier channels, offsets, balance."""

from __future__ import annotations

from dataclasses import dataclass

from quant.scales import KVScales, TensorStats
from quant.spec import MODES

from .derive import balance

# A channel whose absmax exceeds the head's median by this factor is an outlier: under a scale per head it leaves the
# others half of 8 bits' levels at most, a quarter of 4 bits'.
OUTLIER_RATIO = 4.0


@dataclass(frozen=True)
class HeadSummary:
    """One kv head of K or V of one layer. Ratios and sigmas have no unit; min and max are those of the tensor.

    outlier_ratio:  largest channel absmax over the median one; outlier_channel has it.
    num_outliers:   channels whose ratio exceeds OUTLIER_RATIO.
    offset_sigmas:  largest |mean| / standard deviation of a channel; offset_channel has it (a K bias shows here).
    balance_spread: largest over smallest balance.
    """

    layer: int
    tensor: str
    head: int
    tokens: int
    min: float
    max: float
    outlier_ratio: float
    outlier_channel: int
    num_outliers: int
    offset_sigmas: float
    offset_channel: int
    balance_spread: float


def summarise(scales: KVScales) -> list[HeadSummary]:
    """One entry per layer, tensor ("k", then "v") and head, in that order; layers without a cache are left out."""
    present = ((idx, layer) for idx, layer in enumerate(scales.layers) if layer is not None)
    return [
        head
        for idx, layer in present
        for tensor, stats in (("k", layer.k), ("v", layer.v))
        for head in _heads(idx, tensor, stats)
    ]


def _heads(idx: int, tensor: str, stats: TensorStats) -> list[HeadSummary]:
    absmax = stats.absmax
    median = absmax.median(-1, keepdim=True).values.clamp(min=absmax.amax() * 1e-6)
    outliers = absmax / median
    # A channel that never moves has no sigma; the smallest that counts keeps the ratio finite.
    offsets = stats.mean.abs() / stats.var.sqrt().clamp(min=absmax * 1e-6 + 1e-30)
    spread = balance(stats)
    return [
        HeadSummary(
            layer=idx,
            tensor=tensor,
            head=head,
            tokens=stats.tokens,
            min=float(stats.min[head].min()),
            max=float(stats.max[head].max()),
            outlier_ratio=float(outliers[head].max()),
            outlier_channel=int(outliers[head].argmax()),
            num_outliers=int((outliers[head] > OUTLIER_RATIO).sum()),
            offset_sigmas=float(offsets[head].max()),
            offset_channel=int(offsets[head].argmax()),
            balance_spread=float(spread[head].max() / spread[head].min()),
        )
        for head in range(stats.h_kv)
    ]


def bits_per_mode(scales: KVScales) -> dict[str, float]:
    """Stored bits per element of every mode on this model's heads, dynamic scale data included."""
    sizes = [(layer.k.h_kv * layer.k.head_dim, layer.k.head_dim) for layer in scales.layers if layer is not None]
    total = sum(size for size, _ in sizes)
    return {
        name: sum(size * spec.bits_per_element(head_dim) for size, head_dim in sizes) / total
        for name, spec in MODES.items()
    }
