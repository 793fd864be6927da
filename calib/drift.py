"""How far two calibrations lie apart: few samples and all of them, or two corpora. Small drift: it has settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quant.scales import LayerStats, TensorStats

from .derive import balance


@dataclass(frozen=True)
class Drift:
    """The difference of K, or V, between a first calibration and a second one, over all layers.

    range_median, range_max: by how much of its width a channel's range differs, over channels; range_layer has the max.
    outside: share of channels whose range in the second is more than 5 % of its width outside that of the first.
    mean_sigmas:  largest shift of a channel's mean, in its deviations.
    balance_max:  largest ratio of a channel's balances, minus 1.
    """

    tensor: str
    range_median: float
    range_max: float
    range_layer: int
    outside: float
    mean_sigmas: float
    balance_max: float

    def __str__(self) -> str:
        return (
            f"{self.tensor.upper()} ranges {self.range_median:.1%} (at most {self.range_max:.0%}, layer "
            f"{self.range_layer}), {self.outside:.1%} of channels outside, means {self.mean_sigmas:.2f} sigma, "
            f"balance {self.balance_max:.1%}"
        )


HEAD_ROOM = 0.05
"""What a range may be exceeded by before it counts: the head-room of 8 bits."""


def drift(first: Sequence[LayerStats | None], second: Sequence[LayerStats | None]) -> list[Drift]:
    """The drift of K and of V from the first statistics to the second ones, of the same layers."""
    pairs = [
        (idx, a, b) for idx, (a, b) in enumerate(zip(first, second, strict=True)) if a is not None and b is not None
    ]
    return [
        _tensor_drift(name, [(idx, getattr(a, name), getattr(b, name)) for idx, a, b in pairs]) for name in ("k", "v")
    ]


def _tensor_drift(name: str, pairs: Sequence[tuple[int, TensorStats, TensorStats]]) -> Drift:
    changes, outside, means, balances = [], [], [], []
    for _, a, b in pairs:
        width = torch.maximum(a.max - a.min, b.max - b.min).clamp(min=1e-30)
        changes.append((torch.maximum((a.max - b.max).abs(), (a.min - b.min).abs()) / width).flatten())
        over = torch.maximum(b.max - a.max, a.min - b.min)
        outside.append((over > HEAD_ROOM * (a.max - a.min)).float().flatten())
        sigma = torch.maximum(a.var, b.var).sqrt().clamp(min=1e-30)
        means.append(float(((a.mean - b.mean).abs() / sigma).max()))
        ratio = (balance(a).log() - balance(b).log()).abs().max().exp()
        balances.append(float(ratio) - 1)
    largest = [float(change.max()) for change in changes]
    worst = max(range(len(largest)), key=largest.__getitem__)
    return Drift(
        tensor=name,
        range_median=float(torch.cat(changes).median()),
        range_max=largest[worst],
        range_layer=pairs[worst][0],
        outside=float(torch.cat(outside).mean()),
        mean_sigmas=max(means),
        balance_max=max(balances),
    )


def to_json(found: Sequence[Drift]) -> dict[str, Any]:
    """The drifts by tensor, for a file."""
    return {entry.tensor: asdict(entry) for entry in found}
