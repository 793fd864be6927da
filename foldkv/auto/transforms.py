"""Which of mean, balance and rotation a dynamic 4-bit format takes, for each tensor by itself.

All eight combinations are screened without a forward pass: by the error that they leave in the calibration's sampled tokens,
weighted as the collected statistics say that it counts. That error orders them as the KL divergence of the output does
(docs/log.md), so only a combination that is promising is measured on the model, beside the one with all three.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from calib.derive import tensor_params, tensor_shaping
from quant.errors import ArgumentError, describe
from quant.reference import dequantize, quantize
from quant.scales import KVScales, TensorStats
from quant.spec import MODES, Format

from .candidates import DYNAMIC, FULL, TensorSize

WORDS = {"mean": "center", "balance": "balance", "rotate": "rotate"}
"""What the command line calls the flags of a `Format`."""

AUTO = "auto"
PROMISING = 0.9
"""A combination is measured where its screened error is less than this part of that with all three."""

Screened = dict[str, float]
"""Words of a combination -> its error over that of all three."""


def combinations() -> dict[str, Format]:
    """Words -> the dynamic 4-bit format with these of mean, balance and rotation."""
    full = MODES[FULL].k
    found = {}
    for center, balance, rotate in itertools.product((True, False), repeat=3):
        fmt = replace(full, center=center, balance=balance, rotate=rotate)
        found[words(fmt)] = fmt
    return found


def words(fmt: Format) -> str:
    """ "mean+rotate" and the like, "none"."""
    return "+".join(word for word, flag in WORDS.items() if getattr(fmt, flag)) or "none"


def mode_of(fmt: Format) -> str:
    """The mode whose K and V are `fmt`, or the format itself as `resolve_mode` reads it."""
    return next((name for name in DYNAMIC if MODES[name].k == fmt), str(fmt))


def parse_transforms(text: str) -> list[str] | None:
    """Modes of the combinations that a user lists, as "mean+balance+rotate,mean+rotate"; None for "auto".

    ArgumentError for another word.
    """
    if text == AUTO:
        return None
    known = {frozenset(name.split("+")): fmt for name, fmt in combinations().items()}
    found = []
    for part in text.split(","):
        fmt = known.get(frozenset(part.strip().split("+")))
        if fmt is None:
            wanted = f"{AUTO}, none, or some of {', '.join(WORDS)} joined by +, lists of them by commas"
            raise ArgumentError(describe("transforms", wanted, repr(part.strip())))
        found.append(mode_of(fmt))
    return list(dict.fromkeys(found))


def error(stats: TensorStats, fmt: Format, tensor: str) -> float:
    """What a dynamic format leaves of the sampled tokens: squared error under `TensorStats.gram`, heads by their weight.

    Without a Gram matrix by channel, under `TensorStats.weight`. An error of K that all tokens share is left out, as softmax
    does not see it.
    """
    assert stats.sample is not None
    params = tensor_params(stats, fmt)
    codes, scale, zero = quantize(stats.sample, fmt, params, tensor_shaping(stats, fmt))
    left = dequantize(codes, fmt, params, scale, zero, dtype=torch.float32) - stats.sample
    if tensor == "k":
        left = left - left.mean(0)
    if stats.gram is None:
        return float((left.double().square().mean(0) * stats.weight.double()).sum())
    cost = torch.einsum("thd,hde,the->h", left, stats.gram, left).double() / len(left)
    share = stats.gram.diagonal(dim1=1, dim2=2).double().sum(-1).clamp(min=1e-30)
    return float((cost * stats.weight.double().sum(-1) / share).sum())


def screen(scales: KVScales, sizes: Sequence[TensorSize]) -> dict[TensorSize, Screened]:
    """Every combination of each tensor against all three together; nothing for scales that have no sampled tokens."""
    found: dict[TensorSize, Screened] = {}
    for size in sizes:
        layer = scales[size.layer]
        stats = layer.k if size.tensor == "k" else layer.v
        if stats.sample is None or not len(stats.sample):
            return {}
        errors = {name: error(stats, fmt, size.tensor) for name, fmt in combinations().items()}
        whole = max(errors[words(MODES[FULL].k)], 1e-300)
        found[size] = {name: value / whole for name, value in errors.items()}
    return found


def offer(screened: Mapping[TensorSize, Screened], sizes: Sequence[TensorSize]) -> dict[TensorSize, tuple[str, ...]]:
    """The dynamic 4-bit modes to measure for each tensor: all three, and the best other one where it is promising.

    Tensors that were not screened get all three, and the same without the rotation.
    """
    formats = combinations()
    found: dict[TensorSize, tuple[str, ...]] = {}
    for size in sizes:
        if size not in screened:
            found[size] = DYNAMIC
            continue
        others = {name: ratio for name, ratio in screened[size].items() if mode_of(formats[name]) != FULL}
        best = min(others, key=lambda name: others[name])
        found[size] = (FULL, *([mode_of(formats[best])] if others[best] < PROMISING else []))
    return found
