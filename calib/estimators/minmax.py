"""minmax: the calibrated smallest and largest value of every channel."""

from __future__ import annotations

from torch import Tensor

from .target import Estimator, Target


def find_range(target: Target) -> tuple[Tensor, Tensor]:
    """min .. max; the offset of a channel, as under a K bias, costs no codes in an asymmetric format.

    Per-channel K with zero points: KIVI (Liu et al. 2024), KVQuant (Hooper et al. 2024).
    """
    return target.stats.min, target.stats.max


ESTIMATOR = Estimator("minmax", find_range)
