"""From a sample of units to the corpus: shares and totals, each with its 95 % interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Interval", "exact", "share", "total", "wilson"]

Z = 1.959964  # of the normal distribution's middle 95 %
# Student's t for 95 %, by degrees of freedom from 1 on; beyond them the normal value is close enough.
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate between two bounds. exact: counted, so both bounds are the value."""

    value: float
    low: float
    high: float

    @property
    def exact(self) -> bool:
        return self.low == self.high

    def scaled(self, factor: float) -> "Interval":
        return Interval(self.value * factor, self.low * factor, self.high * factor)


def exact(value: float) -> Interval:
    return Interval(value, value, value)


def wilson(hits: float, trials: float) -> Interval:
    """A share and its score interval (Wilson 1927, JASA 22, pages 209 to 212). trials: above 0, fractions allowed."""
    p, z2 = hits / trials, Z * Z
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials))
    return Interval(p, 0.0 if p == 0 else max(0.0, centre - half), 1.0 if p == 1 else min(1.0, centre + half))


def share(units: Sequence[tuple[int, int]], images: float | None) -> Interval:
    """The share of hits in a corpus of which whole units were drawn. units: (hits, trials) of each. images: in all.

    Images of a unit are alike, so many of one unit tell less than as many of different ones: Wilson's interval is taken
    of the effective number of trials (trials / design effect; Kish 1965, section 5.4; Korn & Graubard 1998). A sample
    that is a good part of the corpus tells more: trials / (1 - trials / images). Without a trial nothing is known.
    """
    hits, trials = sum(hit for hit, _ in units), sum(count for _, count in units)
    if not trials:
        return Interval(math.nan, 0.0, 1.0)
    p = hits / trials
    if images is not None and trials >= images:
        return exact(p)
    count = len(units)
    effect = 1.0
    if count > 1 and 0 < p < 1:
        between = count / (count - 1) * sum((hit - p * tried) ** 2 for hit, tried in units) / trials**2
        # Few units tell a variance badly: Student's t widens it, and it is never below that of single images.
        effect = max(1.0, between / (p * (1 - p) / trials) * (_t(count - 1) / Z) ** 2)
    left = 1.0 if images is None else 1 - trials / images
    found = wilson(p * trials / (effect * left), trials / (effect * left))
    return Interval(p, found.low, found.high)


def total(sample: Sequence[tuple[float, float]], sizes: float, units: int) -> Interval:
    """What `units` units of `sizes` in all hold together, from a sample of (held, size): the ratio estimator.

    (Cochran 1977, Sampling Techniques, section 6.4, with its finite population correction.) One unit that is not the
    whole has no spread to tell an interval from: it is half to twice the value.
    """
    count = len(sample)
    ratio = sum(held for held, _ in sample) / sum(size for _, size in sample)
    value = ratio * sizes
    if count >= units:
        return exact(value)
    if count == 1:
        return Interval(value, value / 2, value * 2)
    spread = sum((held - ratio * size) ** 2 for held, size in sample) / (count - 1)
    error = units * math.sqrt((1 - count / units) * spread / count)
    t = _t(count - 1)
    known = sum(held for held, _ in sample)
    return Interval(value, max(known, value - t * error), value + t * error)


def _t(degrees: int) -> float:
    return T[degrees - 1] if degrees <= len(T) else Z
