"""`--fail-if` conditions over a report: `c8.kld_mean > 0.001`, `modes.c8.prefill.kld_p99 >= 0.01`, ..."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quant.errors import ArgumentError, describe

from .summary import METRICS, worst

WAYS = ("prefill", "decode")
"""The ways of exercising a cache, in the order in which they are shown."""

MODE_SIZES = ("bits_per_element", "bytes_per_token", "capacity_ratio")
"""Keys of a mode that do not depend on the way."""

NOISE_METRICS = ("kld_mean", "kld_p99", "top1_agreement")
"""Keys of the noise floor as a whole."""

_OPERATORS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_FORM = re.compile(r"^\s*(?P<path>[^<>=!\s]+)\s*(?P<op>[<>=!]+)\s*(?P<limit>\S+)\s*$")


@dataclass(frozen=True)
class Gate:
    """One condition; the build fails where it holds. `path` is as written, `text` the whole expression."""

    text: str
    path: str
    op: str
    limit: float


@dataclass(frozen=True)
class GateResult:
    """What a gate came to; `value` is None where the figure is not finite, which fails every gate."""

    gate: Gate
    value: float | None
    failed: bool

    def __str__(self) -> str:
        value = "not finite" if self.value is None else f"{self.value:.6g}"
        return f"{self.gate.text}: {self.gate.path} is {value}"


def parse_gate(text: str) -> Gate:
    """Read `PATH OPERATOR NUMBER`. ArgumentError where that is not what it is."""
    match = _FORM.match(text)
    example = "for example 'c8.kld_mean > 0.001'"
    if match is None:
        raise ArgumentError(describe("gate", "PATH OPERATOR NUMBER", repr(text), example))
    if match["op"] not in _OPERATORS:
        raise ArgumentError(describe(f"operator of gate {text!r}", "one of " + " ".join(_OPERATORS), match["op"]))
    try:
        limit = float(match["limit"])
    except ValueError:
        raise ArgumentError(describe(f"limit of gate {text!r}", "a number", repr(match["limit"]), example)) from None
    return Gate(text.strip(), match["path"], match["op"], limit)


def check_gate(gate: Gate, modes: Iterable[str], ways: Iterable[str] = WAYS) -> None:
    """ArgumentError, with the nearest names, unless a report of these modes and ways has the gate's figure."""
    known = known_paths(modes, ways)
    if gate.path not in known:
        near = difflib.get_close_matches(gate.path, known, n=3, cutoff=0.5)
        fix = "did you mean " + " or ".join(near) + "?" if near else "write MODE.METRIC or modes.MODE.WAY.METRIC"
        modes_text = ", ".join(modes)
        raise ArgumentError(describe(f"gate {gate.text!r}", f"a figure of the modes {modes_text}", gate.path, fix))


def known_paths(modes: Iterable[str], ways: Iterable[str] = WAYS) -> list[str]:
    """Every path that a gate may name."""
    metrics, ways = [metric.key for metric in METRICS], list(ways)
    paths = [f"noise_floor.{key}" for key in NOISE_METRICS]
    for mode in modes:
        paths += [f"{mode}.{key}" for key in (*metrics, *MODE_SIZES)]
        paths += [f"modes.{mode}.{key}" for key in MODE_SIZES]
        paths += [f"modes.{mode}.{way}.{key}" for way in ways for key in metrics]
    return paths


def evaluate_gate(gate: Gate, report: Mapping[str, Any]) -> GateResult:
    """Hold a gate against a report's JSON. `MODE.METRIC` means the worst over the ways.

    A figure that is not finite fails the gate, whatever its operator.
    """
    value = _look_up(gate.path, report)
    return GateResult(gate, value, value is None or _OPERATORS[gate.op](value, gate.limit))


def _look_up(path: str, report: Mapping[str, Any]) -> float | None:
    first, *keys = path.split(".")
    if first in ("modes", "noise_floor"):
        node: Any = report[first]
        for key in keys:
            node = node[key]
        return node
    mode, key = report["modes"][first], keys[0]
    return mode[key] if key in MODE_SIZES else worst(key, [mode[way][key] for way in WAYS if way in mode])
