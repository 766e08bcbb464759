"""Axes of charts: two ends and round ticks between them, whatever draws them."""

import math
from dataclasses import dataclass, replace

__all__ = ["Axis", "log_axis", "nice_axis", "share_axis"]


@dataclass(frozen=True, slots=True)
class Axis:
    """What lies between two ends. ticks: (value, text). log: equal ratios are equally far apart; low is above 0."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    title: str = ""
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end; clipped."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        return min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)


def share_axis(title: str = "") -> Axis:
    """0 to 100 per cent."""
    return Axis(0, 1, tuple((tick / 4, f"{25 * tick}") for tick in range(5)), title)


def nice_axis(low: float, high: float, title: str = "", ticks: int = 4, *, whole: bool = False) -> Axis:
    """Round ticks (1, 2 or 5 times a power of ten apart) between two ends that stay as they are. whole: of counts."""
    span = high - low if high > low else 1.0
    raw = max(span / ticks, 1.0 if whole else 0.0)
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    nearly = 1e-9 * span  # an end that rounding moved beside its tick
    first, last = math.ceil((low - nearly) / step), math.floor((low + span + nearly) / step)
    values = [at * step for at in range(first, last + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(low, low + span, tuple((value, _tick(value, digits)) for value in values), title)


def log_axis(low: float, high: float, title: str = "") -> Axis:
    """1, 2 and 5 times powers of ten between two ends above 0; only the powers where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) < 4 else (1,)
    values = [factor * 10.0**power for power in powers for factor in factors]
    if sum(low <= value <= high for value in values) < 2:
        return replace(nice_axis(low, high, title, 3), log=True)
    return Axis(
        low, high, tuple((v, _tick(v, 0) if v >= 1 else f"{v:g}") for v in values if low <= v <= high), title, log=True
    )


def _tick(value: float, digits: int) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):g}{letter}"
    return f"{value:.{digits}f}"
