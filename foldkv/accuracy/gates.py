"""`--fail-if` conditions over a report: `c8.kld_mean > 0.001`, `modes.c8.prefill.kld_p99 >= 0.01`, `near-lossless`, ..."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quant.errors import ArgumentError, describe

from .summary import METRICS, worst

WAYS = ("prefill", "chunked", "decode")
"""The ways of exercising a cache, in the order in which they are shown."""

MODE_SIZES = ("bits_per_element", "bytes_per_token", "capacity_ratio", "level_rank")
"""Keys of a mode that do not depend on the way."""

PRESETS = ("lossless", "near-lossless", "usable")
"""Levels that a gate may name, the strictest first; `level_rank` of a mode counts from 0 at the first, 4 is suspect."""

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
    """What a gate came to; `value` is None where the figure is not finite, which fails every gate.

    close: the figure lies within two of its standard errors of the limit, so another text could turn the gate.
    """

    gate: Gate
    value: float | None
    failed: bool
    close: bool = False

    def __str__(self) -> str:
        value = "not finite" if self.value is None else f"{self.value:.6g}"
        return f"{self.gate.text}: {self.gate.path} is {value}" + (" (within its error)" if self.close else "")


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


def parse_gates(texts: Iterable[str], modes: Iterable[str]) -> list[Gate]:
    """The gates of `--fail-if`: conditions, or presets.

    `near-lossless` fails where any of `modes`, the control aside, is worse than that level, `c8:near-lossless` where c8 is.
    """
    modes = list(modes)
    gates = []
    for text in texts:
        mode, _, preset = text.strip().rpartition(":")
        if preset in PRESETS and (not mode or mode in modes):
            rank = PRESETS.index(preset)
            wanted = [mode] if mode else modes
            gates += [Gate(f"{preset}: {name}.level_rank > {rank}", f"{name}.level_rank", ">", rank) for name in wanted]
        else:
            gates.append(parse_gate(text))
    return gates


def check_gate(gate: Gate, modes: Iterable[str], ways: Iterable[str] = WAYS, extras: Iterable[str] = ()) -> None:
    """ArgumentError, with the nearest names, unless a report of these modes and ways has the gate's figure."""
    modes = list(modes)
    known = known_paths(modes, ways, extras)
    if gate.path not in known:
        near = difflib.get_close_matches(gate.path, known, n=3, cutoff=0.5)
        fix = "did you mean " + " or ".join(near) + "?" if near else "write MODE.METRIC or modes.MODE.WAY.METRIC"
        modes_text = ", ".join(modes)
        raise ArgumentError(describe(f"gate {gate.text!r}", f"a figure of the modes {modes_text}", gate.path, fix))


def known_paths(modes: Iterable[str], ways: Iterable[str] = WAYS, extras: Iterable[str] = ()) -> list[str]:
    """Every path that a gate may name. extras: paths inside a mode that this report has besides."""
    extras = list(extras)
    metrics, ways = [metric.key for metric in METRICS], list(ways)
    paths = [f"noise_floor.{key}" for key in NOISE_METRICS]
    for mode in modes:
        paths += [f"{mode}.{key}" for key in (*metrics, *MODE_SIZES)]
        paths += [f"modes.{mode}.{key}" for key in MODE_SIZES]
        paths += [f"modes.{mode}.{way}.{key}" for way in ways for key in metrics]
        paths += [f"{start}{mode}.{key}" for start in ("", "modes.") for key in extras]
    return paths


def evaluate_gate(gate: Gate, report: Mapping[str, Any]) -> GateResult:
    """Hold a gate against a report's JSON. `MODE.METRIC` means the worst over the ways.

    A figure that is not finite fails the gate, whatever its operator.
    """
    value = _look_up(gate.path, report)
    error = _look_up(_ERRORS.sub("_se", gate.path), report) if _ERRORS.search(gate.path) else None
    close = value is not None and bool(error) and abs(value - gate.limit) <= 2 * (error or 0.0)
    return GateResult(gate, value, value is None or _OPERATORS[gate.op](value, gate.limit), close)


_ERRORS = re.compile(r"(?<=kld)_mean$|(?<=top1)_agreement$|(?<=delta_p)_mean$|(?<=ppl)$|(?<=ratio)$")
"""The ends of paths that have a standard error, which `_se` in their place names."""


def _look_up(path: str, report: Mapping[str, Any]) -> float | None:
    keys = path.split(".")
    if keys[0] == "noise_floor":
        return _walk(report, keys)
    modes = report["modes"]
    # The name of a mode may hold dots itself; the longest that fits is meant.
    rest = keys[1:] if keys[0] == "modes" else keys
    count = next(n for n in range(len(rest) - 1, 0, -1) if ".".join(rest[:n]) in modes)
    mode, rest = modes[".".join(rest[:count])], rest[count:]
    if keys[0] == "modes" or len(rest) > 1 or rest[0] in MODE_SIZES:
        return _walk(mode, rest)
    return worst(rest[0], [mode[way].get(rest[0]) for way in WAYS if way in mode])


def _walk(node: Any, keys: list[str]) -> float | None:
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node if isinstance(node, (int, float)) else None
