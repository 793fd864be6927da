"""The report's plots: bits against KLD, KLD along the window, spread and histogram of the KLD, K against V, heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .gates import WAYS
from .svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Axis, Drawing, log_range, spread

NUM_COLOURS = 6
TALL = 340
_LABEL_ROOM = 40


def series_class(report: Mapping[str, Any], mode: str) -> str:
    """CSS class of a mode's marks: one colour each, the control its own."""
    modes = report["modes"]
    if modes[mode]["control"]:
        return "control"
    return f"s{[name for name in modes if not modes[name]['control']].index(mode) % NUM_COLOURS}"


def pareto(report: Mapping[str, Any]) -> str:
    """Stored bits against mean KLD: full dots for prefill, rings for decode, diamonds for other formats; the levels' limits."""
    points = [
        (entry["bits_per_element"], entry[way]["kld_mean"], mode, way)
        for mode, entry in report["modes"].items()
        for way in ("prefill", "decode")
        if way in entry and entry[way]["kld_mean"] is not None
    ]
    others = [
        (entry["bits_per_element"], figures["kld_mean"], name)
        for name, entry in report["baselines"].items()
        for figures in [next(entry[way] for way in WAYS if way in entry)]
        if figures["kld_mean"] is not None
    ]
    floor = report["noise_floor"]["kld_mean"]
    drawing = Drawing("Stored bits per element against mean KLD to the 16-bit cache", height=TALL)
    bits = [point[0] for point in (*points, *others)] or [8.0]
    x = Axis(min(3.5, min(bits) - 0.5), max(8.8, max(bits) + 0.9), LEFT, WIDTH - RIGHT)
    klds = [p[1] for p in (*points, *others)] + [floor or 0.0, report["levels"][0]["max_kld"]]
    y = Axis(*log_range(klds), drawing.height - BOTTOM, TOP, log=True)
    drawing.axes(x, y, "bits per element, scale data included", "KLD")
    lines = [(level["max_kld"], "limit", f"{level['name']} below") for level in report["levels"]]
    for kld, style, text in [*lines, (floor or 0.0, "floor", "noise floor")]:
        if kld > 0:
            drawing.line(LEFT, y(kld), WIDTH - RIGHT, y(kld), style)
            drawing.text(LEFT + 4, y(kld) - 3, text, "limit-label")
    for bit, kld, name in others:
        drawing.diamond(x(bit), y(kld), "peer", f"{name}: {bit:.3g} bits, KLD {kld:.3g}")
    for bit, kld, mode, way in points:
        style = "ring" if way == "decode" else "dot"
        hint = f"{mode}, {way}: {bit:.3g} bits, KLD {kld:.3g}"
        drawing.dot(x(bit), y(kld), f"{style} {series_class(report, mode)}", hint, 5.0 if way == "decode" else 2.8)
    places = {mode: (x(bit), y(kld), series_class(report, mode)) for bit, kld, mode, _ in points}
    places |= {name: (x(bit), y(kld), "peer") for bit, kld, name in others}
    _label_points(drawing, places)
    return drawing.svg()


def _label_points(drawing: Drawing, places: Mapping[str, tuple[float, float, str]]) -> None:
    """A name beside each point, right of it where there is room, moved up or down until names do not meet."""
    taken: list[tuple[float, float, float, float]] = []
    marks = [(at - 6, height - 6, at + 6, height + 6) for at, height, _ in places.values()]
    for name, (at, height, style) in sorted(places.items(), key=lambda item: (item[1][2] == "peer", item[1][1])):
        room, best = 6.3 * len(name), None
        for down in (0, -11, 11, -22, 22, -33, 33, -44, 44):
            for anchor, left in (("start", at + 9), ("end", at - 9 - room), ("middle", at - room / 2)):
                if anchor == "middle" and not down:
                    continue
                box = (left, height + down - 6, left + room, height + down + 5)
                others = [mark for mark in marks if mark[0] != at - 6 or mark[1] != height - 6]
                inside = left > LEFT - 4 and box[2] < WIDTH and box[1] > TOP - 6 and box[3] < drawing.height - BOTTOM
                if inside and not any(_meet(box, other) for other in (*taken, *others)):
                    best = best or (box, anchor)
        if best is None:
            continue  # the point keeps its hint
        box, anchor = best
        taken.append(box)
        place = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[anchor]
        drawing.text(place, box[1] + 10, name, f"name {style}", anchor)


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


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
        if way in entry and way != "chunked" and entry[way]["kld_max"] is not None
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


def histogram(report: Mapping[str, Any]) -> str:
    """For each mode the share of positions by their KLD, the first way that was measured; a bar to the right is damage."""
    way = next(way for way in WAYS if way in report["base"])
    rows = [(mode, entry[way]["histogram"]) for mode, entry in report["modes"].items()]
    step, top = 46.0, 20.0
    drawing = Drawing(f"Positions by their KLD, {way}", height=TOP + top + step * len(rows) + BOTTOM)
    logs = rows[0][1]["log10"]
    used = [i for _, row in rows for i, count in enumerate(row["counts"]) if count]
    first, last = max(0, min(used)), min(len(logs) - 1, max(used))
    x = Axis(10 ** logs[first], 10 ** (logs[last] + 0.5), LEFT + 30, WIDTH - RIGHT, log=True)
    drawing.axes(x, None, f"KLD of one position ({way}); height: share of the positions")
    for i, (mode, row) in enumerate(rows):
        base, total = TOP + top + step * (i + 1) - 4, sum(row["counts"])
        highest = max(row["counts"])
        style = series_class(report, mode)
        drawing.text(0, base - 4, mode, f"name {style}")
        for n in range(first, last + 1):
            count = row["counts"][n]
            if count:
                left, right = x(10 ** logs[n]), x(10 ** (logs[n] + 0.5))
                height = max(1.0, (step - 12) * count / highest)
                hint = f"{mode}: {count / total:.1%} of the positions at 1e{logs[n]:g} .. 1e{logs[n] + 0.5:g}"
                drawing.box(left, base - height, right - left - 1, height, f"bar {style}", hint)
        drawing.line(LEFT + 30, base, WIDTH - RIGHT, base, "axis")
    return drawing.svg()


def parts(report: Mapping[str, Any]) -> str:
    """Mean KLD with K alone quantised, V alone, and both, a row a mode. Empty where that was not measured."""
    rows = [(mode, entry["parts"]) for mode, entry in report["modes"].items() if entry.get("parts")]
    if not rows:
        return ""
    step, top = 30.0, 26.0
    drawing = Drawing("Mean KLD with K alone, or V alone, quantised", height=TOP + top + step * len(rows) + BOTTOM)
    values = [(mode, [part[key]["kld_mean"] for key in ("k_only", "v_only")]) for mode, part in rows]
    x = Axis(*log_range([v or 0.0 for _, pair in values for v in pair]), LEFT + 30, WIDTH - RIGHT, log=True)
    drawing.axes(x, None, "mean KLD")
    drawing.text(0, TOP + 6, "K: K alone quantised, V: V alone", "label")
    for i, (mode, pair) in enumerate(values):
        at, style = TOP + top + step * (i + 0.5), series_class(report, mode)
        drawing.text(0, at + 4, mode, f"name {style}")
        places = [x(value) if value else x(x.low) for value in pair]
        drawing.line(min(places), at, max(places), at, f"thin {style}")
        for place, value, letter in zip(places, pair, "KV", strict=True):
            drawing.dot(place, at, f"dot {style}", f"{mode}, {letter} alone: KLD {value or 0:.3g}", 9.0)
            drawing.text(place, at + 4, letter, "letter", "middle")
    return drawing.svg()


HEAT_STEPS = 6


def heat_maps(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(mode, picture) of layers by kv heads: KLD with that head alone quantised, else the error of its output.

    All modes share one logarithmic scale, so that pictures may be compared. Empty where neither was measured.
    """
    grids = {mode: heat_grid(entry) for mode, entry in report["modes"].items()}
    grids = {mode: grid for mode, grid in grids.items() if grid}
    values = [value for grid in grids.values() for row in grid.values() for value in row if value]
    if not values:
        return []
    low, high = min(values), max(values)
    scale = Axis(low, high if high > low else low * 10, 0.0, 1.0, log=True)
    return [(mode, _heat_map(mode, grid, scale)) for mode, grid in grids.items()]


def heat_grid(entry: Mapping[str, Any]) -> dict[int, list[float]]:
    """Layer -> a value a kv head."""
    grid: dict[int, list[float]] = {}
    if entry.get("heads"):
        for one in entry["heads"]:
            grid.setdefault(one["layer"], []).append(one["alone"]["kld_mean"] or 0.0)
        return grid
    return {one["layer"]: list(one["out_error"]) for one in entry.get("damage", [])}


def _heat_map(mode: str, grid: Mapping[int, list[float]], scale: Axis) -> str:
    heads = max(len(row) for row in grid.values())
    columns = [f"h{head}" if heads <= 16 or head % 4 == 0 else "" for head in range(heads)]
    rows = {str(layer) if len(grid) <= 40 or layer % 4 == 0 else f" {layer}": row for layer, row in grid.items()}
    return heat_picture(f"{mode}: damage by layer and head", rows, columns, scale)


def heat_picture(title: str, grid: Mapping[str, list[float]], columns: Sequence[str], scale: Axis) -> str:
    """Named rows of values as a table of coloured cells, dark where large; a name that begins with a space is not shown.

    scale: from a value to 0 .. 1. Cells show their values where they are large enough.
    """
    left, top = 12.0 + 6.4 * max(len(name) for name in grid), 20.0
    width = max(7.0, min(64.0, (WIDTH - left) / len(columns)))
    height = 22.0 if len(grid) <= 16 else 13.0
    drawing = Drawing(title, height=top + height * len(grid) + 4, width=left + width * len(columns), natural=True)
    for i, name in enumerate(columns):
        drawing.text(left + width * (i + 0.5), 13, name, "tick", "middle")
    for i, (name, row) in enumerate(grid.items()):
        at = top + height * i
        if not name.startswith(" "):
            drawing.text(left - 6, at + height / 2 + 4, name, "tick", "end")
        for n, value in enumerate(row):
            level = max(0, min(HEAT_STEPS - 1, int(HEAT_STEPS * scale(value)))) if value > 0 else 0
            hint = f"{name.strip()}, {columns[n]}: {value:.3g}"
            drawing.box(left + width * n, at, width - 2, height - 2, f"heat h{level}", hint)
            if width >= 38 and height >= 20:
                text = f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e") if value < 0.01 else f"{value:.2g}"
                drawing.text(left + width * (n + 0.5) - 1, at + height / 2 + 3, text, f"cell h{level}", "middle")
    return drawing.svg()
