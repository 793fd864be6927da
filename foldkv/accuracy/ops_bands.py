"""Errors of the ops, gathered over rows and lengths, and the bands in which they must lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quant.spec import KVSpec

KERNEL_BAND = 2.0
"""RMS error of the kernel over that of plain PyTorch in the same precision; a step's largest may be twice this."""
LSE_BAND = 3.0
SUM_BAND = (0.7, 1.3)
"""Total error over the root of the sum of squares of its two parts, wherever it is not lost in rounding."""
STEP_BAND = (0.2, 0.36)
"""RMS error of K and V in quantisation steps: 0.289 for a uniform quantiser that clips nothing."""
EXACT = 1e-7
"""Relative errors below this are rounding of the sums."""

BUCKETS = (1, 2, 17, 65, 257, 513, 1025, 4097)
"""Lengths at which columns of the heat map begin."""


@dataclass
class Errors:
    """Sums of squares over rows, and the largest row; `rms` and `worst` are relative to the truth's RMS over all rows."""

    square: float = 0.0
    truth: float = 0.0
    rows: int = 0
    largest: float = 0.0

    def add(self, got: Tensor, want: Tensor) -> None:
        """Rows `[n, h_q, d]`."""
        error, size = (x.double().square().sum(-1) for x in (got.double() - want, want))
        self.square += float(error.sum())
        self.truth += float(size.sum())
        self.rows += error.numel()
        self.largest = max(self.largest, float(error.max()))

    @property
    def rms(self) -> float:
        return math.sqrt(self.square / self.truth) if self.truth else 0.0

    @property
    def worst(self) -> float:
        return math.sqrt(self.largest * self.rows / self.truth) if self.truth else 0.0

    def to_json(self) -> dict[str, float]:
        return {"rms": self.rms, "worst": self.worst}


KINDS = ("total", "quantised", "kernel", "plain", "vs_fp16")


@dataclass
class Tally:
    """The errors of one case, all lengths together and by bucket."""

    kinds: dict[str, Errors] = field(default_factory=lambda: {kind: Errors() for kind in KINDS})
    buckets: dict[int, dict[str, Errors]] = field(default_factory=dict)
    lse: float = 0.0
    plain_lse: float = 0.0
    lengths: set[int] = field(default_factory=set)
    nonfinite: int = 0

    def add(self, length: int, kind: str, got: Tensor, want: Tensor) -> None:
        begin = max(edge for edge in BUCKETS if edge <= length)
        row = self.buckets.setdefault(begin, {one: Errors() for one in KINDS})
        for errors in (self.kinds[kind], row[kind]):
            errors.add(got, want)


def outside_bands(row: dict[str, Any], spec: KVSpec, dtype: torch.dtype) -> list[str]:
    """What of a case lies outside its bands, in words; nothing where all is well. dtype: of the yardstick."""
    found = []
    if not math.isfinite(row["kernel"]["rms"]):
        return ["outputs are not finite"]
    floor = torch.finfo(dtype).eps / 4
    for key, times in (("rms", 1.0), ("worst", 2.0)):
        limit = times * (KERNEL_BAND * row["plain"][key] + floor)
        if not row["kernel"][key] <= limit:
            found.append(f"kernel error {row['kernel'][key]:.2g} ({key}), at most {limit:.2g}")
    limit = LSE_BAND * row["plain_lse"] + torch.finfo(dtype).eps
    if not row["lse"] <= limit:
        found.append(f"LSE error {row['lse']:.2g}, at most {limit:.2g}")
    parts = math.hypot(row["quantised"]["rms"], row["kernel"]["rms"])
    if parts > EXACT and not SUM_BAND[0] <= row["total"]["rms"] / parts <= SUM_BAND[1]:
        found.append(f"total error {row['total']['rms']:.2g} is not made of its parts, {parts:.2g}")
    for name, fmt in (("k", spec.k), ("v", spec.v)):
        steps = row["steps"][name]
        if (
            steps is not None
            and fmt.clip >= 1
            and row["data"] == "gaussian"
            and not STEP_BAND[0] <= steps <= STEP_BAND[1]
        ):
            found.append(f"{name.upper()} is off by {steps:.2g} steps, {STEP_BAND[0]} .. {STEP_BAND[1]} expected")
    if row["wrong_bytes"]:
        found.append(f"{row['wrong_bytes']} bytes of the cache differ from the reference's")
    if row["nonfinite"]:
        found.append(f"{row['nonfinite']} outputs are not finite")
    return found
