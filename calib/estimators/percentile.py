"""percentile: the range without the rarest values."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.scales import PERCENTILES

from .target import Estimator, Target

PERCENT = 99.9
"""Per cent of a channel's values below its upper end; as many lie above the lower one."""


def find_range(target: Target) -> tuple[Tensor, Tensor]:
    """From the 0.1 % to the 99.9 % percentile of every channel, from the sampled tokens.

    "Integer Quantization for Deep Learning Inference" (Wu et al. 2020). The best found for K at 4 bits (docs/accuracy.md);
    at 8 bits steps are fine enough, and what is cut costs more. The range is final: `Format.clip` does not cut it again.
    """
    low, high = (PERCENTILES.index(percent) for percent in (round(100 - PERCENT, 1), PERCENT))
    ends = target.stats.percentiles
    # A channel that hardly ever moves keeps its full range.
    flat = ends[low] == ends[high]
    return torch.where(flat, target.stats.min, ends[low]), torch.where(flat, target.stats.max, ends[high])


ESTIMATOR = Estimator("percentile", find_range, searches=True)
