"""What an estimator works on, and the search that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import CalibrationError, describe
from quant.pages import SCALE, ZERO, identity_params
from quant.reference import dequantize, quantize
from quant.scales import TensorStats
from quant.spec import Format

from ..derive import grid
from ..sequences import LayerSequences

FACTORS = tuple(0.5 + 0.025 * step for step in range(25))
"""Factors of the calibrated range that a search tries: 0.5 .. 1.1."""


@dataclass(frozen=True)
class Target:
    """One tensor of one layer. fmt: a static format. sequences: of the layer, where the estimator asked for them."""

    stats: TensorStats
    fmt: Format
    sequences: LayerSequences | None = None

    def tokens(self) -> Tensor:
        """Sampled tokens fp32 `[n, h_kv, d]`; CalibrationError where they were not kept."""
        if self.stats.sample is None or not len(self.stats.sample):
            raise CalibrationError(describe("estimator", "sampled tokens", "statistics alone", "calibrate again"))
        return self.stats.sample

    def whole(self) -> LayerSequences:
        """Sampled sequences; CalibrationError where they were not kept."""
        if self.sequences is None or not self.sequences.q:
            fix = "calibrate on text without padding"
            raise CalibrationError(describe("estimator", "sampled sequences", "none", fix))
        return self.sequences

    def shrunk(self, factor: float) -> tuple[Tensor, Tensor]:
        """The calibrated range times `factor` about its middle (about zero for symmetric formats), `[h_kv, d]` each."""
        if self.fmt.symmetric:
            bound = self.stats.absmax * factor
            return -bound, bound
        middle, half = (self.stats.max + self.stats.min) / 2, (self.stats.max - self.stats.min) / 2
        return middle - half * factor, middle + half * factor

    def stored(self, x: Tensor, factor: float) -> Tensor:
        """Rows `x` `[n, h_kv, d]` as they come back from codes over that range."""
        scale = grid(*self.shrunk(factor), self.fmt)
        params = identity_params(self.fmt, self.stats.h_kv, self.stats.head_dim)
        params[SCALE], params[ZERO] = scale.scale[:, 0], scale.zero_point[:, 0]
        return dequantize(*_reordered(quantize(x, self.fmt, params), self.fmt, params), dtype=torch.float32)


def _reordered(
    codes: tuple[Tensor, Tensor, Tensor], fmt: Format, params: Tensor
) -> tuple[Tensor, Format, Tensor, Tensor, Tensor]:
    return codes[0], fmt, params, codes[1], codes[2]


@dataclass(frozen=True)
class Estimator:
    """A way to choose ranges.

    find_range: from a target to low and high, `[h_kv, d]` each. searches: its ranges are final, no clip or head-room.
    tensors: "k", "v" or "kv", what it is for. needs: "stats", "tokens" or "sequences".
    """

    name: str
    find_range: Callable[[Target], tuple[Tensor, Tensor]]
    tensors: str = "kv"
    searches: bool = False
    needs: str = "stats"


def least(
    target: Target, loss: Callable[[float], Tensor], factors: tuple[float, ...] = FACTORS
) -> tuple[Tensor, Tensor]:
    """The range whose factor has the least `loss`: a tensor `[h_kv, d]` or `[h_kv, 1]`, each entry for itself."""
    found: Tensor | None = None
    for factor in factors:
        got, (low, high) = loss(factor), target.shrunk(factor)
        if found is None:
            found, best_low, best_high = got, low, high
            continue
        better = got < found
        found = torch.where(better, got, found)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
    return best_low, best_high
