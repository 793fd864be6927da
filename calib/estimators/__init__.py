"""Estimators: which range of values a static scale shall cover, by name.

`estimate` applies one. minmax, absmax and percentile read statistics; the others search a factor of the calibrated
range for the least loss on tokens (mse, head_room) or on whole sequences with their real queries (softmax_kl,
attention_output).
"""

from __future__ import annotations

from quant.errors import ArgumentError, describe
from quant.scales import StaticScale

from ..derive import default_head_room, grid
from . import absmax, attention_output, head_room, minmax, mse, percentile, softmax_kl
from .target import Estimator, Target

ESTIMATORS: dict[str, Estimator] = {
    module.ESTIMATOR.name: module.ESTIMATOR
    for module in (minmax, absmax, percentile, mse, softmax_kl, attention_output, head_room)
}
DEFAULT = "minmax"


def estimator(name: str, tensor: str) -> Estimator:
    """The estimator called `name`; ArgumentError for an unknown one, or one that is not for K or V (`tensor`)."""
    if name not in ESTIMATORS:
        raise ArgumentError(describe("estimator", f"one of {', '.join(ESTIMATORS)}", repr(name)))
    found = ESTIMATORS[name]
    if tensor not in found.tensors:
        fitting = [name for name, other in ESTIMATORS.items() if tensor in other.tensors]
        raise ArgumentError(describe(f"estimator of {tensor.upper()}", f"one of {', '.join(fitting)}", repr(name)))
    return found


def parse_estimators(text: str) -> tuple[Estimator, Estimator]:
    """The estimators of K and of V that `NAME` or `K/V` means."""
    names = text.split("/")
    if len(names) > 2:
        raise ArgumentError(describe("estimator", "NAME, or K/V of two names", repr(text)))
    return estimator(names[0], "k"), estimator(names[-1], "v")


def estimate(found: Estimator, target: Target) -> StaticScale:
    """The static scale of `target.fmt` over the range that the estimator finds.

    An estimator that searches its own factor is taken at its word; for the others `Format.clip` and, from 8 bits on,
    some head-room apply.
    """
    low, high = found.find_range(target)
    widen = 1.0 if found.searches else target.fmt.clip * default_head_room(target.fmt)
    return grid(low, high, target.fmt, widen)


__all__ = ["DEFAULT", "ESTIMATORS", "Estimator", "Target", "estimate", "estimator", "parse_estimators"]
