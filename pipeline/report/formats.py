"""Numbers and figures as people read them: an en dash for no evidence, per cent for shares, the field's own names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeGuard

__all__ = [
    "DASH",
    "FigureFormat",
    "count",
    "duration",
    "figure_format",
    "is_number",
    "moment",
    "number",
    "percent",
    "size",
]

DASH = "–"


@dataclass(frozen=True, slots=True)
class FigureFormat:
    """How one figure is shown. name: as the field writes it. kind: share (0 to 1, shown in per cent) or number.

    unit: after the value. lower: whether less is better. help: one line for a tooltip.
    """

    name: str
    kind: Literal["share", "number"] = "share"
    unit: str = "%"
    lower: bool = False
    help: str = ""

    def show(self, value: float | None, *, unit: bool = False) -> str:
        """The value, with its unit where asked; an en dash where there is none."""
        if not is_number(value):
            return DASH
        text = percent(value) if self.kind == "share" else number(value)
        return f"{text} {self.unit}" if unit and self.unit else text


def _error(name: str, help_text: str, unit: str = "") -> FigureFormat:
    return FigureFormat(name, "number", unit, True, help_text)


FORMATS: Mapping[str, FigureFormat] = {
    "mIoU": FigureFormat("mIoU", help="mean IoU over the classes in the target or the prediction"),
    "mIoU_present": FigureFormat("mIoU (present)", help="mean IoU over the classes in the target"),
    "fwIoU": FigureFormat("fwIoU", help="IoU weighted by each class's share of target pixels"),
    "pixel_accuracy": FigureFormat("pixel accuracy", help="target pixels that are right"),
    "mean_accuracy": FigureFormat("mean accuracy", help="mean over classes of the target pixels that are right"),
    "dice": FigureFormat("Dice", help="mean over classes of 2 both / (target + prediction)"),
    "PQ": FigureFormat("PQ", help="panoptic quality: SQ times RQ"),
    "SQ": FigureFormat("SQ", help="segmentation quality: mean IoU of the matched segments"),
    "RQ": FigureFormat("RQ", help="recognition quality: F1 of the segments"),
    "F1": FigureFormat("F1", help="2 tp / (2 tp + fp + fn) at IoU 0.50, all predictions"),
    "AP": FigureFormat("AP", help="mean over IoU 0.50 to 0.95"),
    "AP50": FigureFormat("AP50", help="at IoU 0.50"),
    "AP75": FigureFormat("AP75", help="at IoU 0.75"),
    "APs": FigureFormat("AP small", help="targets below 32² pixels"),
    "APm": FigureFormat("AP medium", help="targets of 32² to 96² pixels"),
    "APl": FigureFormat("AP large", help="targets above 96² pixels"),
    "AR1": FigureFormat("AR, 1 per image", help="largest recall with 1 prediction per image and class"),
    "AR10": FigureFormat("AR, 10 per image", help="largest recall with 10 predictions per image and class"),
    "AR100": FigureFormat("AR, 100 per image", help="largest recall with 100 predictions per image and class"),
    "ARs": FigureFormat("AR small", help="targets below 32² pixels"),
    "ARm": FigureFormat("AR medium", help="targets of 32² to 96² pixels"),
    "ARl": FigureFormat("AR large", help="targets above 96² pixels"),
    "AbsRel": _error("AbsRel", "mean of |g - p| / g"),
    "SqRel": _error("SqRel", "mean of (g - p)² / g, as most papers print it", "m"),
    "SqRel_squared": _error("SqRel, squared", "mean of (g - p)² / g²: the other definition"),
    "RMSE": _error("RMSE", "root of the mean of (g - p)²", "m"),
    "RMSElog": _error("RMSE log", "root of the mean of (ln g - ln p)²"),
    "log10": _error("log10", "mean of |log10 g - log10 p|"),
    "SILog": _error("SILog", "100 times the standard deviation of ln p - ln g, as KITTI prints it"),
    "delta1": FigureFormat("δ < 1.25", help="pixels with max(g / p, p / g) below 1.25"),
    "delta2": FigureFormat("δ < 1.25²", help="pixels with max(g / p, p / g) below 1.25²"),
    "delta3": FigureFormat("δ < 1.25³", help="pixels with max(g / p, p / g) below 1.25³"),
}
# What stands before or after a figure's name where its path says of what it is.
GROUPS = {
    "Things": "{}, things",
    "Stuff": "{}, stuff",
    "bbox": "{}, boxes",
    "segm": "{}, masks",
    "boundary": "boundary {}",
    "boundary_panoptic": "boundary {}",
}


def figure_format(path: str) -> FigureFormat:
    """How the figure at `path` (`semantic.mIoU`, `detection.segm.AP`) is shown; unknown ones as plain numbers."""
    *groups, last = path.split(".")
    found = FORMATS.get(last, FigureFormat(last, "number", ""))
    name = found.name
    for group in reversed(groups):
        name = GROUPS.get(group, "{}").replace("{}", name)
    return replace(found, name=name)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether there is a finite number to show; None and NaN mean no evidence."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent, without the sign: 0.7123 is 71.2. What would round to 100 or 0 and is not, stays off it."""
    if not is_number(value):
        return DASH
    text = f"{100 * value:.{digits}f}"
    if value < 1 and text == f"{100:.{digits}f}":
        return f">{100 - 10**-digits:.{digits}f}"
    return f"<{10**-digits:.{digits}f}" if value > 0 and float(text) == 0 else text


def number(value: float | None) -> str:
    """Three or four digits that count: 0.140, 4.25, 57.1, 1,234."""
    if not is_number(value):
        return DASH
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with commas."""
    return DASH if not is_number(value) else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in the unit that fits: 2.3 MB (of 1000)."""
    if not is_number(value):
        return DASH
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(value) < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as 0.7 s, 19.6 s, 2 min 19 s, 3 h 04 min."""
    if seconds is None or not is_number(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def moment(text: Any) -> str:
    """An ISO time as 2026-03-01 09:45 UTC; what is none stays as it is."""
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return str(text)
    return f"{time.astimezone(UTC) if time.tzinfo else time:%Y-%m-%d %H:%M}{' UTC' if time.tzinfo else ''}"
