"""ops.md and ops.html from the JSON of an op-level report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from .plots import heat_picture
from .present import Rows, sci
from .render import environment
from .svg import Axis

Cases = list[Mapping[str, Any]]


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report for a pull request."""
    return environment().get_template("ops.md.j2").render(_view(report)).rstrip() + "\n"


def to_html(report: Mapping[str, Any]) -> str:
    """The report as one page without scripts or anything to load."""
    return environment().get_template("ops.html.j2").render(_view(report))


def _view(report: Mapping[str, Any]) -> dict[str, Any]:
    cases: Cases = report["cases"]
    modes = list(dict.fromkeys(case["mode"] for case in cases))
    ratio: Callable[[Mapping[str, Any]], float] = lambda case: _ratio(case, "kernel", "plain")  # noqa: E731
    pictures = [
        (
            "Error of the output, quantisation and kernel together",
            _by_data(cases, modes, lambda case: case["total"]["rms"]),
        ),
        ("The kernel's own error, over that of plain PyTorch", _by_data(cases, modes, ratio, linear=True)),
        ("Error of the output by length of the sequence", _by_length(cases, modes)),
    ]
    return {
        "report": report,
        "verdict": verdict(report),
        "pictures": [(title, Markup(picture)) for title, picture in pictures],
        "summary": summary_table(cases, modes),
        "cases": case_table(cases),
        "setup": _setup(report),
    }


def verdict(report: Mapping[str, Any]) -> str:
    """The sentence that a reader takes away."""
    cases = report["cases"]
    modes = list(dict.fromkeys(case["mode"] for case in cases))
    replays = sum(case["replays"] for case in cases)
    how = "replays of captured CUDA graphs" if report["setup"]["graph"] else "steps, called, as a CPU has no graphs,"
    text = f"{len(cases)} cases of {', '.join(modes)}: {replays:,} {how} at lengths 1 to {max(c['longest'] for c in cases)}"
    outside = len(report["outside"])
    return text + (": every error within its band." if not outside else f": {outside} errors outside their bands.")


def summary_table(cases: Cases, modes: list[str]) -> tuple[list[str], Rows]:
    """A row a mode, the largest over its cases."""
    head = ["mode", "bits", "total error", "of the bits", "of the kernel", "kernel / plain PyTorch", "LSE error",
            "LSE / plain PyTorch", "wrong bytes"]  # fmt: skip
    rows = []
    for mode in modes:
        own = [case for case in cases if case["mode"] == mode]
        most = {kind: max(case[kind]["rms"] for case in own) for kind in ("total", "quantised", "kernel")}
        bits = " .. ".join(f"{x:.3g}" for x in sorted({case["bits_per_element"] for case in own}))
        rows.append([
            mode, bits, *(sci(most[kind]) for kind in ("total", "quantised", "kernel")),
            f"{max(_ratio(case, 'kernel', 'plain') for case in own):.2f}", sci(max(case["lse"] for case in own)),
            f"{max(case['lse'] / (case['plain_lse'] or 1e-30) for case in own):.2f}",
            str(sum(case["wrong_bytes"] for case in own)),
        ])  # fmt: skip
    return head, rows


def case_table(cases: Cases) -> tuple[list[str], Rows]:
    """A row a case."""
    head = ["mode", "data", "shape", "total", "of the bits", "of the kernel", "plain PyTorch", "against fp16", "worst row",
            "LSE", "K, steps", "V, steps", ""]  # fmt: skip
    return head, [
        [
            case["mode"], case["data"], case["shape"],
            *(sci(case[kind]["rms"]) for kind in ("total", "quantised", "kernel", "plain", "vs_fp16")),
            sci(case["kernel"]["worst"]), sci(case["lse"]),
            *("" if case["steps"][x] is None else f"{case['steps'][x]:.3f}" for x in "kv"),
            "outside" if case["outside"] else "ok",
        ]
        for case in cases
    ]  # fmt: skip


def _ratio(case: Mapping[str, Any], a: str, b: str) -> float:
    return case[a]["rms"] / (case[b]["rms"] or 1e-30)


def _by_data(cases: Cases, modes: list[str], value: Callable[[Any], float], linear: bool = False) -> str:
    """Rows of data by columns of modes, the largest over shapes."""
    grid: dict[str, list[float]] = {}
    for name in dict.fromkeys(case["data"] for case in cases):
        grid[name] = [
            max((value(case) for case in cases if (case["data"], case["mode"]) == (name, mode)), default=0.0)
            for mode in modes
        ]
    scale = Axis(0.0, 2.0, 0.0, 1.0) if linear else _scale(grid)
    return heat_picture("errors by data and mode", grid, modes, scale)


def _by_length(cases: Cases, modes: list[str]) -> str:
    """Rows of modes by columns of lengths, the mean over cases."""
    begins = sorted({row["begin"] for case in cases for row in case["by_length"]})
    grid = {}
    for mode in modes:
        own = [{row["begin"]: row["total"] for row in case["by_length"]} for case in cases if case["mode"] == mode]
        columns = [[row[begin] for row in own if begin in row] for begin in begins]
        grid[mode] = [sum(column) / len(column) if column else 0.0 for column in columns]
    ends = [
        *(f"{a}–{b - 1}" if b - a > 1 else str(a) for a, b in zip(begins, begins[1:], strict=False)),
        f"{begins[-1]}+",
    ]
    return heat_picture("errors by length and mode", grid, ends, _scale(grid))


def _scale(grid: Mapping[str, list[float]]) -> Axis:
    values = [value for row in grid.values() for value in row if value > 0] or [1.0]
    return Axis(min(values), max(max(values), min(values) * 10), 0.0, 1.0, log=True)


def _setup(report: Mapping[str, Any]) -> Rows:
    setup = report["setup"]
    return [
        ["device", f"{setup['device_name']}, {setup['dtype']}, {setup['threads']} threads"],
        ["kernels", setup["kernels"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in setup["versions"].items())],
        ["commit", setup["commit"] or "installed package"],
        ["date", setup["date"]],
    ]
