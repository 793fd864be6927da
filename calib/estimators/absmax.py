"""absmax: as far to either side of zero as the largest magnitude."""

from __future__ import annotations

from torch import Tensor

from .target import Estimator, Target


def find_range(target: Target) -> tuple[Tensor, Tensor]:
    """-absmax .. absmax of every channel: no offset, even in an asymmetric format.

    The plain choice of LLM.int8() (Dettmers et al. 2022) and of most engines.
    """
    return -target.stats.absmax, target.stats.absmax


ESTIMATOR = Estimator("absmax", find_range)
