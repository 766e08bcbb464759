"""Charts as inline SVG from small pure functions. Colours are classes of style.css, so that dark mode and print work.

A chart of its own is as wide as a phone (WIDTH) and scales with its column; bars of table cells stretch to theirs.
Whatever comes from data is escaped. Values that are None or not finite are left out.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from pipeline.axes import Axis, log_axis, nice_axis, share_axis
from pipeline.report.formats import count, is_number, number, percent

__all__ = [
    "Axis",
    "Layer",
    "Number",
    "Point",
    "Series",
    "bar",
    "heat_map",
    "histogram",
    "interval_bar",
    "line_chart",
    "log_axis",
    "nice_axis",
    "quality_map",
    "rect",
    "share_axis",
    "stack",
    "svg",
    "swatch",
]

Number = float | None

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 10, 36
CELL = 30
NAME_CHARACTERS = 16
SHOWN_SHARE = 0.005  # cells of a heat map below it are left empty


def bar(value: Number, *, maximum: float = 1.0, mark: Number = None, kind: str = "accent") -> Markup:
    """A bar beside a number in a table cell; its track stands for `maximum`. mark: a value to compare with, a tick."""
    length = 100 * min(max(value / (maximum or 1.0), 0), 1) if is_number(value) else 0
    parts = [rect(0, 0, 100, 6, "track"), rect(0, 0, length, 6, kind)]
    if is_number(mark):
        parts.append(rect(min(max(100 * mark / (maximum or 1.0), 0.5), 99.5) - 0.5, 0, 1, 6, "mark"))
    return svg(parts, 100, 6, "bar", stretch=True)


def interval_bar(value: Number, low: Number, high: Number, axis: Axis, label: str) -> Markup:
    """A value and its interval on an axis: a line, a band from low to high, a tick at the value."""
    parts = [rect(0, 6.5, 200, 1, "track")]
    if is_number(low) and is_number(high):
        left, right = 200 * axis.place(low), 200 * axis.place(high)
        parts.append(rect(left, 3.5, max(right - left, 1), 7, "band"))
    if is_number(value):
        parts.append(rect(min(max(200 * axis.place(value), 1), 199) - 1, 0, 2, 14, "accent"))
    return svg(parts, 200, 14, "interval", stretch=True, label=label)


def stack(parts: Sequence[tuple[str, float, str]], label: str) -> Markup:
    """Shares of a whole side by side: (what, how much, class)."""
    total = sum(value for _, value, _ in parts) or 1.0
    pieces, left = [rect(0, 0, 100, 10, "track")], 0.0
    for name, value, kind in parts:
        length = 100 * value / total
        if length:
            pieces.append(rect(left, 0, length, 10, kind, f"{name}: {percent(value / total)} %"))
        left += length
    return svg(pieces, 100, 10, "stack", stretch=True, label=label)


def swatch(color: Sequence[int]) -> Markup:
    """The display colour of a class."""
    red, green, blue = (int(value) & 255 for value in color)
    square = Markup('<rect width="10" height="10" rx="2" fill="rgb({},{},{})"/>').format(red, green, blue)
    return svg([square], 10, 10, "swatch")


@dataclass(frozen=True, slots=True)
class Layer:
    """Counts of one kind in a histogram's bins."""

    name: str
    counts: Sequence[Number]
    kind: str = "accent"


def histogram(
    edges: Sequence[float],
    layers: Sequence[Layer],
    axis: Axis,
    label: str,
    *,
    beyond: tuple[Number, Number] = (0, 0),
    mark: Number = None,
) -> Markup:
    """Bins between `edges`, layers on top of each other. beyond: counts below the first and above the last edge, drawn
    outside the axis. mark: a value to point out."""
    rows = [[_known(value) for value in layer.counts] for layer in layers]
    below, above = (_known(value) for value in beyond)
    top = max([*(sum(column) for column in zip(*rows, strict=True)), below, above, 0]) or 1.0
    frame = _Frame(axis, nice_axis(0, top, ticks=3, whole=True))
    parts = frame.draw()
    begins = [0.0] * (len(edges) - 1)
    for layer, row in zip(layers, rows, strict=True):
        for at, (value, begin) in enumerate(zip(row, begins, strict=True)):
            left, right = frame.x(edges[at]), frame.x(edges[at + 1])
            if value and right > left:
                text = f"{number(edges[at])} to {number(edges[at + 1])}: {count(value)} {layer.name}"
                gap = 1 if right - left > 4 else 0.3
                parts.append(_column(frame, left, right - left - gap, begin, value, layer.kind, text))
            begins[at] = begin + value
    for value, left, text in (
        (below, LEFT - 7, f"below {number(edges[0])}"),
        (above, WIDTH - RIGHT + 2, f"above {number(edges[-1])}"),
    ):
        if value:
            parts.append(_column(frame, left, 5, 0, value, "rest", f"{text}: {count(value)} {layers[0].name}"))
    if is_number(mark):
        parts.append(rect(frame.x(mark) - 0.75, TOP, 1.5, HEIGHT - TOP - BOTTOM, "mark", number(mark)))
    return svg(parts, WIDTH, HEIGHT, "chart", label=label)


def _known(value: Number) -> float:
    return value if is_number(value) else 0.0


def _column(frame: "_Frame", left: float, width: float, begin: float, value: float, kind: str, text: str) -> Markup:
    upper, lower = frame.y(begin + value), frame.y(begin)
    return rect(left, min(upper, lower - 0.7), width, max(lower - upper, 0.7), kind, text)


@dataclass(frozen=True, slots=True)
class Series:
    """A line of points (x, y). kind: its class in style.css."""

    name: str
    points: Sequence[tuple[Number, Number]]
    kind: str = "first"


def line_chart(
    series: Sequence[Series], x: Axis, y: Axis, label: str, marks: Iterable[tuple[float, str]] = ()
) -> Markup:
    """Lines on two axes. marks: values of x to point out, each with a text."""
    frame = _Frame(x, y)
    parts = frame.draw()
    for value, text in marks:
        place = frame.x(value)
        parts.append(rect(place - 0.5, TOP, 1, HEIGHT - TOP - BOTTOM, "guide"))
        parts.append(_text(place + 3, HEIGHT - BOTTOM - 6, text, "tick start"))
    for line in series:
        known = [(frame.x(a), frame.y(b)) for a, b in line.points if is_number(a) and is_number(b)]
        if known:
            path = "M" + "L".join(f"{_n(left)} {_n(top)}" for left, top in known)
            title = Markup("<title>{}</title>").format(line.name)
            parts.append(Markup('<path class="line {}" d="{}">{}</path>').format(line.kind, path, title))
    return svg(parts, WIDTH, HEIGHT, "chart", label=label)


@dataclass(frozen=True, slots=True)
class Point:
    """One class of a quality map. text: its tooltip."""

    name: str
    rq: Number
    sq: Number
    text: str
    kind: str = "thing"


def quality_map(points: Sequence[Point], label: str, named: int = 3) -> Markup:
    """SQ over RQ, a dot for each class, with lines of equal PQ = SQ x RQ; the `named` worst ones by name."""
    known = [(p, p.rq, p.sq) for p in points if is_number(p.rq) and is_number(p.sq)]
    lowest = min((sq for _, _, sq in known if sq > 0), default=0.5)
    low = max(0.0, min(0.5, math.floor(lowest * 10) / 10))
    y = Axis(low, 1, tuple((v, f"{100 * v:.0f}") for v in (low, (1 + low) / 2, 1.0)), "SQ %")
    frame = _Frame(share_axis("RQ %"), y)
    parts = frame.draw()
    for level in (0.2, 0.4, 0.6, 0.8):
        steps = [max(level, low) + at / 24 * (1 - max(level, low)) for at in range(25)]
        path = "M" + "L".join(f"{_n(frame.x(level / sq))} {_n(frame.y(sq))}" for sq in steps)
        parts.append(Markup('<path class="guide-line" d="{}"/>').format(path))
        parts.append(_text(frame.x(level) + 3, TOP + 9, f"PQ {100 * level:.0f}", "tick start faint"))
    for point, rq, sq in known:
        dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="4"><title>{}</title></circle>')
        parts.append(dot.format(point.kind, _n(frame.x(rq)), _n(frame.y(sq)), point.text))
    taken: list[tuple[float, float]] = []
    for point, rq, sq in sorted(known, key=lambda item: item[1] * item[2])[:named]:
        left, top = frame.x(rq), frame.y(sq)
        if all(abs(left - other) > 90 or abs(top - beside) > 11 for other, beside in taken):
            side = "end" if rq > 0.7 else "start"
            parts.append(_text(left + (-7 if side == "end" else 7), top + 4, _short(point.name), f"tick {side}"))
            taken.append((left, top))
    return svg(parts, WIDTH, HEIGHT, "chart", label=label)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Sequence[Sequence[Number]],
    label: str,
    *,
    diagonal: bool = True,
) -> Markup:
    """Shares of each row (0 to 1) as cells: darker is more. diagonal: cells where row and column are the same place are
    right, in gray. Numbers stand in the cells of small maps, values of all cells of SHOWN_SHARE or more in tooltips."""
    small = len(columns) <= 14
    cell = CELL + 6 if small else 18
    left = 14 + 6.4 * max([4, *(len(_short(name)) for name in rows)])
    top = 24 + 5 * max([4, *(len(_short(name)) for name in columns)])
    width, height = left + cell * len(columns) + 8, top + cell * len(rows) + 4
    parts = [
        _text(left - 8, top + cell * (at + 0.5) + 4, _short(name), "tick end", name) for at, name in enumerate(rows)
    ]
    for at, name in enumerate(columns):
        x = left + cell * (at + 0.5) + 4
        text = Markup('<text class="tick start" transform="translate({} {}) rotate(-50)">{}<title>{}</title></text>')
        parts.append(text.format(_n(x), top - 6, _short(name), name))
    for row, values in enumerate(shares):
        parts.append(rect(left, top + cell * row, cell * len(columns) - 1, cell - 1, "track faint"))
        for column, value in enumerate(values):
            if not is_number(value) or value < SHOWN_SHARE:
                continue
            right = diagonal and row == column
            x, y = left + cell * column, top + cell * row
            # The root makes rare mistakes visible beside common ones; the tooltip and the number say how much it is.
            opacity = 0.08 + 0.82 * math.sqrt(min(value, 1)) * (0.55 if right else 1)
            said = "right" if right else f"seen as {columns[column]}"
            title = f"{rows[row]} {said}: {percent(value)} %"
            parts.append(rect(x, y, cell - 1, cell - 1, "right" if right else "accent", title, opacity=opacity))
            if small:
                light = "on" if opacity > 0.55 and not right else ""
                parts.append(_text(x + (cell - 1) / 2, y + cell / 2 + 4, f"{100 * value:.0f}", f"cell {light}"))
    return svg(parts, width, height, "heat", label=label, fixed=True)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where values lie on a chart of WIDTH x HEIGHT, and its grid."""

    across: Axis
    up: Axis

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * self.across.place(value)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * self.up.place(value)

    def draw(self) -> list[Markup]:
        parts = []
        for value, text in self.up.ticks:
            parts.append(rect(LEFT, self.y(value) - 0.5, WIDTH - LEFT - RIGHT, 1, "grid"))
            parts.append(_text(LEFT - 10, self.y(value) + 4, text, "tick end"))
        for value, text in self.across.ticks:
            parts.append(_text(self.x(value), HEIGHT - BOTTOM + 15, text, "tick middle"))
        if self.across.title:
            parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, self.across.title, "title end"))
        if self.up.title:
            parts.append(_text(0, HEIGHT - 4, f"↑ {self.up.title}", "title start"))
        return parts


def svg(
    parts: Iterable[Markup],
    width: float,
    height: float,
    kind: str,
    *,
    stretch: bool = False,
    fixed: bool = False,
    label: str = "",
) -> Markup:
    """A drawing of parts. kind: its class. stretch: as wide as its cell. fixed: as large as it is drawn.

    label: what it shows, for those who do not see it; without one it only repeats what stands beside it.
    """
    seen = Markup('role="img" aria-label="{}"').format(label) if label else Markup('aria-hidden="true"')
    shape = Markup(' preserveAspectRatio="none"') if stretch else Markup("")
    shape = Markup(' width="{}" height="{}"').format(_n(width), _n(height)) if fixed else shape
    opening = Markup('<svg class="{}" viewBox="0 0 {} {}"{} {}>').format(kind, _n(width), _n(height), shape, seen)
    return opening + Markup("").join(parts) + Markup("</svg>")


def rect(
    x: float, y: float, width: float, height: float, kind: str, title: str = "", *, opacity: float | None = None
) -> Markup:
    """kind: its class, which colours it. title: its tooltip."""
    inside = Markup("<title>{}</title>").format(title) if title else Markup("")
    look = Markup(' fill-opacity="{}"').format(_n(opacity)) if opacity is not None else Markup("")
    place = Markup('x="{}" y="{}" width="{}" height="{}"').format(_n(x), _n(y), _n(width), _n(height))
    return Markup('<rect class="{}" {}{}>{}</rect>').format(kind, place, look, inside)


def _text(x: float, y: float, text: str, kind: str, title: str = "") -> Markup:
    inside = Markup("<title>{}</title>").format(title) if title and title != text else Markup("")
    return Markup('<text class="{}" x="{}" y="{}">{}{}</text>').format(kind, _n(x), _n(y), escape(text), inside)


def _short(name: str) -> str:
    return name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - 1] + "…"


def _n(value: float) -> str:
    """Two digits after the point are finer than a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
