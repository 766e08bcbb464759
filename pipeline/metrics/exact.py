"""Exact sums of float64 values: the same bits whatever the order, the grouping or the number of partial sums.

Every finite float64 is a whole number times a power of two, so a sum of them is one too; Python's integers hold it
without rounding. It is rounded once, when read. A sum of a million values of like size takes about 80 bits.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["EXACT_SUM", "ExactSum", "exact_sums"]

# The row form: the sum as a float64, then what that rounding left, rounded again, until nothing is left. So the first
# item is the sum itself for every reader, and one value's sum is just that value. The empty list is 0.
EXACT_SUM = pa.list_(pa.float64())

# Halves of a 53-bit mantissa; 2**36 of them sum to less than 2**63.
HALF_BITS = 27
HALF_MASK = (1 << HALF_BITS) - 1
MAX_VALUES = 1 << 36


@dataclass(frozen=True, slots=True)
class ExactSum:
    """A sum as mantissa * 2**exponent; the mantissa is odd, or both are 0, so that equal sums are equal values."""

    mantissa: int = 0
    exponent: int = 0

    @classmethod
    def empty(cls) -> "ExactSum":
        return cls()

    @classmethod
    def of(cls, values: Iterable[float] | npt.NDArray[np.floating[Any]]) -> "ExactSum":
        """The sum of any number of finite values. Raises ValueError for NaN and infinities."""
        flat = np.asarray(values if isinstance(values, np.ndarray) else list(values), np.float64).ravel()
        if len(flat) > 1:
            return exact_sums(np.zeros(len(flat), np.intp), flat, 1)[0]
        return cls._from_float(float(flat[0])) if len(flat) else cls()

    @classmethod
    def _from_float(cls, value: float) -> "ExactSum":
        try:
            numerator, denominator = value.as_integer_ratio()
        except (ValueError, OverflowError) as error:
            raise ValueError(f"expected finite values to sum, got {value}") from error
        return _normal(numerator, 1 - denominator.bit_length())

    def merge(self, other: "ExactSum") -> "ExactSum":
        low, high = (self, other) if self.exponent <= other.exponent else (other, self)
        return _normal(low.mantissa + (high.mantissa << (high.exponent - low.exponent)), low.exponent)

    def compute(self) -> float:
        """The sum, correctly rounded. Raises OverflowError beyond the float64 range."""
        return self.divide(1)

    def divide(self, count: int) -> float:
        """The sum over `count`, correctly rounded from the exact quotient. NaN where count is 0."""
        if count == 0:
            return float("nan")
        # Python rounds the quotient of two integers correctly, whatever their size.
        return (self.mantissa << max(self.exponent, 0)) / (count << max(-self.exponent, 0))

    def to_row(self) -> list[float]:
        """See EXACT_SUM."""
        parts: list[float] = []
        rest = self
        while rest.mantissa:
            parts.append(rest.compute())
            rest = rest.merge(self._from_float(-parts[-1]))
        return parts

    @classmethod
    def from_row(cls, row: Iterable[float]) -> "ExactSum":
        """The inverse of `to_row`; any other list of finite values is their sum."""
        return cls.of(row)


def _normal(mantissa: int, exponent: int) -> ExactSum:
    if not mantissa:
        return ExactSum()
    zeros = (mantissa & -mantissa).bit_length() - 1
    return ExactSum(mantissa >> zeros, exponent + zeros)


def exact_sums(index: npt.NDArray[np.integer[Any]], values: npt.NDArray[np.floating[Any]], size: int) -> list[ExactSum]:
    """Sums of values (N) by index (N), 0 to size - 1; what no index names is 0..

    Raises ValueError for values that are not finite and for an index out of range.
    """
    flat = np.asarray(values, np.float64)
    if flat.shape != index.shape or flat.ndim != 1 or len(flat) > MAX_VALUES:
        raise ValueError(f"expected as many values as indices, in one dimension, got {flat.shape} and {index.shape}")
    if not np.isfinite(flat).all():
        raise ValueError("expected finite values to sum, got NaN or infinity")
    if len(flat) and (index.min() < 0 or index.max() >= size):
        raise ValueError(f"expected indices from 0 to {size - 1}, got {index.min()} to {index.max()}")
    sums = [ExactSum()] * size
    if not len(flat):
        return sums
    fraction, exponent = np.frexp(flat)
    mantissa = np.ldexp(fraction, 53).astype(np.int64)
    # One bin for each (index, exponent) that occurs; whole numbers of one exponent add without rounding.
    bins, place = np.unique(index.astype(np.int64) * 4096 + (exponent + 2048), return_inverse=True)
    order = np.argsort(place, kind="stable")
    first = np.searchsorted(place[order], np.arange(len(bins)))
    mantissa = mantissa[order]
    high = np.add.reduceat(mantissa >> HALF_BITS, first)
    low = np.add.reduceat(mantissa & HALF_MASK, first)
    for at, big, small in zip(bins.tolist(), high.tolist(), low.tolist(), strict=True):
        number, power = divmod(at, 4096)
        sums[number] = sums[number].merge(_normal((big << HALF_BITS) + small, power - 2048 - 53))
    return sums
