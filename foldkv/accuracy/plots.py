"""The report's plots: bits against KLD, KLD along the window, spread of the KLD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .gates import WAYS
from .svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Axis, Drawing, log_range, spread

NUM_COLOURS = 6
_LABEL_ROOM = 40
_EMPTY_BITS = 5.6
"""Where hardly any mode lies, so that names of lines have room."""


def series_class(report: Mapping[str, Any], mode: str) -> str:
    """CSS class of a mode's marks: one colour each, the control its own."""
    modes = report["modes"]
    if modes[mode]["control"]:
        return "control"
    return f"s{[name for name in modes if not modes[name]['control']].index(mode) % NUM_COLOURS}"


def pareto(report: Mapping[str, Any]) -> str:
    """Stored bits against mean KLD: full dots for prefill, rings for decode, with the limits of the levels."""
    points = [
        (entry["bits_per_element"], entry[way]["kld_mean"], mode, way)
        for mode, entry in report["modes"].items()
        for way in WAYS
        if way in entry and entry[way]["kld_mean"] is not None
    ]
    floor = report["noise_floor"]["kld_mean"]
    drawing = Drawing("Stored bits per element against mean KLD to the 16-bit cache")
    bits = [point[0] for point in points] or [8.0]
    x = Axis(min(3.5, *bits), max(8.8, max(bits) + 0.8), LEFT, WIDTH - RIGHT)
    y = Axis(
        *log_range([p[1] for p in points] + [floor or 0.0, report["levels"][0]["max_kld"]]),
        drawing.height - BOTTOM,
        TOP,
        log=True,
    )
    drawing.axes(x, y, "bits per element, scale data included", "KLD")
    lines = [(level["max_kld"], "limit", f"{level['name']} below") for level in report["levels"]]
    for kld, style, text in [*lines, (floor or 0.0, "floor", "noise floor")]:
        if kld > 0:
            drawing.line(LEFT, y(kld), WIDTH - RIGHT, y(kld), style)
            drawing.text(x(_EMPTY_BITS), y(kld) - 3, text, "limit-label", "middle")
    for bit, kld, mode, way in points:
        style = "ring" if way == "decode" else "dot"
        hint = f"{mode}, {way}: {bit:.3g} bits, KLD {kld:.3g}"
        drawing.dot(x(bit), y(kld), f"{style} {series_class(report, mode)}", hint, 5.0 if way == "decode" else 2.8)
    _label_points(drawing, report, {mode: (x(bit), y(kld)) for bit, kld, mode, _ in points})
    return drawing.svg()


def _label_points(drawing: Drawing, report: Mapping[str, Any], places: Mapping[str, tuple[float, float]]) -> None:
    """Names right of the points, left of the first of neighbours or where the picture ends."""
    columns: list[list[str]] = []
    for mode in sorted(places, key=lambda name: places[name][0]):
        if columns and places[mode][0] - places[columns[-1][0]][0] < _LABEL_ROOM:
            columns[-1].append(mode)
        else:
            columns.append([mode])
    for column in columns:
        for mode in column:
            (at, height), room = places[mode], 9 + 7 * len(mode)
            first, last = mode == column[0], mode == column[-1]
            if last and at + room < WIDTH:
                place = (at + 9, height + 4, "start")
            elif (first or last) and at - room > LEFT:
                place = (at - 9, height + 4, "end")
            else:
                place = (at, height - 9, "middle")
            drawing.text(*place[:2], mode, f"name {series_class(report, mode)}", place[2])


def position_curve(report: Mapping[str, Any]) -> str:
    """Mean KLD along the window, each mode a line with its name at the end; prefill where it was measured."""
    way = next(way for way in WAYS if any(way in entry for entry in report["modes"].values()))
    curves = {
        mode: [(at, kld) for at, kld in entry[way]["curve"] if kld]
        for mode, entry in report["modes"].items()
        if way in entry
    }
    curves = {mode: curve for mode, curve in curves.items() if curve}
    drawing = Drawing(f"Mean KLD by position in the window, {way}")
    last = max((curve[-1][0] for curve in curves.values()), default=1.0)
    x = Axis(0, max(last, 1.0), LEFT, WIDTH - RIGHT - _LABEL_ROOM)
    y = Axis(*log_range([kld for curve in curves.values() for _, kld in curve]), drawing.height - BOTTOM, TOP, log=True)
    drawing.axes(x, y, f"cached tokens before the position ({way})", "KLD")
    ends = spread([y(curve[-1][1]) for curve in curves.values()], 13, TOP + 6, drawing.height - BOTTOM - 2)
    for (mode, curve), end in zip(curves.items(), ends, strict=True):
        style = series_class(report, mode)
        drawing.path([(x(at), y(kld)) for at, kld in curve], f"curve {style}")
        drawing.text(x(curve[-1][0]) + 6, end + 4, mode, f"name {style}")
    return drawing.svg()


def percentile_bars(report: Mapping[str, Any]) -> str:
    """For each mode and way the spread of the KLD: median to 99th percentile, on to 99.9th and the largest; mean."""
    rows = [
        (mode, way, entry[way])
        for mode, entry in report["modes"].items()
        for way in WAYS
        if way in entry and entry[way]["kld_max"] is not None
    ]
    step, head = 21.0, 26.0
    drawing = Drawing("Spread of the KLD over positions", height=TOP + head + step * len(rows) + BOTTOM)
    keys = ("kld_p50", "kld_p99", "kld_p999", "kld_max")
    x = Axis(*log_range([row[2][key] for row in rows for key in keys]), LEFT + 62, WIDTH - RIGHT, log=True)
    drawing.axes(x, None, "KLD of one position")
    drawing.text(0, TOP + 6, "bar: median to 99 %, line: 99.9 %, dot: largest, tick: mean", "label")
    for i, (mode, way, figures) in enumerate(rows):
        at, style = TOP + head + step * (i + 0.5), series_class(report, mode)
        median, p99, p999, largest = (x(figures[key]) for key in keys)
        drawing.text(0, at + 4, mode, f"name {style}")
        drawing.text(LEFT + 56, at + 4, way, "tick", "end")
        drawing.line(median, at, p999, at, f"thin {style}")
        drawing.line(median, at, p99, at, f"thick {style}")
        drawing.dot(largest, at, f"dot {style}", f"{mode}, {way}: largest {figures['kld_max']:.3g}", 2.5)
        drawing.line(x(figures["kld_mean"]), at - 8, x(figures["kld_mean"]), at + 8, "mean")
    return drawing.svg()
