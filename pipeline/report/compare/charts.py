"""Charts of differences, for cells of tables: an interval around 0, and a bar to either side of it."""

from markupsafe import Markup

from pipeline.report.charts import Number, rect, svg
from pipeline.report.formats import is_number

__all__ = ["difference_bar", "diverging_bar"]

WIDTH, HEIGHT = 200, 14
MIDDLE = WIDTH / 2


def difference_bar(value: Number, low: Number, high: Number, reach: float, kind: str, label: str = "") -> Markup:
    """A difference and its interval on a line from -reach to reach, with a mark at 0. kind: the class of its colour."""
    parts = [rect(0, 6.5, WIDTH, 1, "track"), rect(MIDDLE - 0.5, 0, 1, HEIGHT, "mark zero")]
    if is_number(low) and is_number(high):
        left, right = _place(low, reach), _place(high, reach)
        parts.append(rect(left, 4, max(right - left, 1), 6, f"{kind} span"))
    if is_number(value):
        parts.append(rect(_place(value, reach) - 1.25, 1, 2.5, HEIGHT - 2, kind))
    return svg(parts, WIDTH, HEIGHT, "interval", stretch=True, label=label)


def diverging_bar(value: Number, low: Number, high: Number, reach: float, kind: str) -> Markup:
    """A bar from 0 to a difference, a thin line over its interval."""
    parts = [rect(0, 0, WIDTH, HEIGHT, "track faint"), rect(MIDDLE - 0.5, 0, 1, HEIGHT, "mark zero")]
    if is_number(value):
        left, right = sorted((MIDDLE, _place(value, reach)))
        parts.append(rect(left, 3, max(right - left, 1), HEIGHT - 6, kind))
    if is_number(low) and is_number(high):
        left, right = _place(low, reach), _place(high, reach)
        parts.append(rect(left, 6.5, max(right - left, 1), 1, "mark"))
    return svg(parts, WIDTH, HEIGHT, "interval", stretch=True)


def _place(value: float, reach: float) -> float:
    """Clipped to the line."""
    return MIDDLE + MIDDLE * min(max(value / (reach or 1.0), -1.0), 1.0)
