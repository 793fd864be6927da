"""Small SVG drawings for the report: axes, lines, marks. Colours are CSS classes of the page, so they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

WIDTH, HEIGHT = 384, 264
LEFT, RIGHT, TOP, BOTTOM = 36, 10, 12, 38

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """A scale from `low` .. `high` to pixels `start` .. `end`, linear or logarithmic; values outside are clamped."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        low, high = (math.log10(x) if self.log else x for x in (self.low, self.high))
        share = ((math.log10(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Values and labels: decades of a logarithmic axis, else multiples of 1, 2 or 5 times a power of ten."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, -(-(last - first) // 7))
            return [(10.0**n, "10" + str(n).translate(_SUPERSCRIPT)) for n in range(first, last + 1, step)]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step_size = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        values = [step_size * n for n in range(math.ceil(self.low / step_size), math.floor(self.high / step_size) + 1)]
        return [(value, f"{value:g}") for value in values]


def log_range(values: Sequence[float], default: tuple[float, float] = (1e-6, 1.0)) -> tuple[float, float]:
    """Whole decades around the positive values."""
    logs = [math.log10(value) for value in values if value > 0]
    if not logs:
        return default
    low, high = math.floor(min(logs) - 0.1), math.ceil(max(logs) + 0.1)
    return 10.0**low, 10.0 ** max(high, low + 1)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart to at least `gap`, as near to the wanted ones as the range allows."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + gap) if placed else max(wanted[i], low))
    limit = high
    for n in reversed(range(len(placed))):
        placed[n] = min(placed[n], limit)
        limit = placed[n] - gap
    result = [0.0] * len(wanted)
    for n, i in enumerate(order):
        result[i] = placed[n]
    return result


@dataclass
class Drawing:
    """An SVG picture of `width` x `height` units that scales with the page, or, `natural`, is never larger than that.

    title: its text for screen readers.
    """

    title: str
    height: float = HEIGHT
    width: float = WIDTH
    natural: bool = False
    parts: list[str] = field(default_factory=list)

    def element(self, name: str, content: str | None = None, **attributes: Any) -> None:
        """Add an element; attribute `class_` becomes `class`, underscores become hyphens, text is escaped."""
        written = "".join(
            f' {key.rstrip("_").replace("_", "-")}="{_number(value)}"'
            for key, value in attributes.items()
            if value != ""
        )
        self.parts.append(f"<{name}{written}/>" if content is None else f"<{name}{written}>{escape(content)}</{name}>")

    def line(self, x1: float, y1: float, x2: float, y2: float, class_: str) -> None:
        self.element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)

    def text(self, x: float, y: float, content: str, class_: str = "", anchor: str = "start") -> None:
        self.element("text", content, x=x, y=y, class_=class_, text_anchor=anchor)

    def dot(self, x: float, y: float, class_: str, hint: str, radius: float = 4.5) -> None:
        """A round mark; `hint` shows when it is pointed at."""
        place = f'cx="{_number(x)}" cy="{_number(y)}" r="{_number(radius)}"'
        self.parts.append(f'<circle class="{escape(class_)}" {place}><title>{escape(hint)}</title></circle>')

    def diamond(self, x: float, y: float, class_: str, hint: str, radius: float = 4.5) -> None:
        """A square mark on its corner."""
        corners = ((x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y))
        points = " ".join(f"{_number(a)},{_number(b)}" for a, b in corners)
        self.parts.append(
            f'<polygon class="{escape(class_)}" points="{points}"><title>{escape(hint)}</title></polygon>'
        )

    def box(self, x: float, y: float, width: float, height: float, class_: str, hint: str) -> None:
        """A filled rectangle."""
        place = " ".join(
            f'{key}="{_number(float(value))}"'
            for key, value in (("x", x), ("y", y), ("width", width), ("height", height))
        )
        self.parts.append(f'<rect class="{escape(class_)}" {place}><title>{escape(hint)}</title></rect>')

    def path(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        """A line through `points`."""
        self.element("polyline", points=" ".join(f"{_number(x)},{_number(y)}" for x, y in points), class_=class_)

    def axes(self, x: Axis, y: Axis | None, x_label: str, y_label: str = "") -> None:
        """Grid lines, tick labels and names of both axes; without `y` only the horizontal one."""
        bottom = self.height - BOTTOM
        for value, label in x.ticks():
            self.line(x(value), TOP, x(value), bottom, "grid")
            self.text(x(value), bottom + 15, label, "tick", "middle")
        for value, label in y.ticks() if y else ():
            self.line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid")  # type: ignore[misc]
            self.text(LEFT - 6, y(value) + 4, label, "tick", "end")  # type: ignore[misc]
        self.line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis")
        self.text(WIDTH - RIGHT, self.height - 6, x_label, "label", "end")
        if y_label:
            self.text(0, self.height - 6, y_label, "label")

    def svg(self) -> str:
        """The markup."""
        box = f'viewBox="0 0 {_number(self.width)} {_number(self.height)}" role="img" aria-label="{escape(self.title)}"'
        if self.natural:
            box += f' style="max-width: {_number(self.width)}px"'
        return f"<svg {box}>{''.join(self.parts)}</svg>"


def _number(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escape(str(value))
