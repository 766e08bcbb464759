"""What a report names one by one: problems by kind with examples, and the worst and best images, in bounded memory."""

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.report.figures import ImageFigure

__all__ = ["Extremes", "Problems"]

EXAMPLES = 20


class Problems:
    """Rows without figures by outcome, type and stage; of each kind the first images by id."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str], int] = {}
        self._examples: dict[tuple[str, str, str], list[tuple[str, str]]] = {}

    def add(self, rows: pa.RecordBatch) -> None:
        """Add rows whose outcome is not ok."""
        found: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
        columns = ("outcome", "error_type", "error_stage", "image_id", "error_message")
        for *kind, image_id, message in zip(*(rows[name].to_pylist() for name in columns), strict=True):
            found.setdefault(tuple(kind), []).append((image_id or "", message or ""))
        for key, items in found.items():
            self._counts[key] = self._counts.get(key, 0) + len(items)
            self._examples[key] = heapq.nsmallest(EXAMPLES, [*self._examples.get(key, ()), *items])

    def compute(self) -> list[dict[str, Any]]:
        """[{outcome, type, stage, count, examples: [{image_id, message}]}], the most frequent kind first."""
        return [
            {
                **dict(zip(("outcome", "type", "stage"), kind, strict=True)),
                "count": count,
                "examples": [{"image_id": image_id, "message": text} for image_id, text in self._examples[kind]],
            }
            for kind, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        ]


class Extremes:
    """The images with the lowest and the highest values of one figure; of equal ones the first by id."""

    def __init__(self, figure: ImageFigure, images: int) -> None:
        self._rising = figure.rising
        self._low, self._high = _Lowest(images), _Lowest(images)

    def add(self, value_N: npt.NDArray[np.float64], rows: pa.RecordBatch) -> None:
        """Add images: their values, NaN for none, and their rows."""
        self._low.add(value_N, rows)
        self._high.add(-value_N, rows)

    def worst(self) -> list[dict[str, Any]]:
        """[{image_id, shard_id, position, value}], the worst first."""
        return self._low.items() if self._rising else self._high.items(-1.0)

    def best(self) -> list[dict[str, Any]]:
        """The same from the best on."""
        return self._high.items(-1.0) if self._rising else self._low.items()


class _Lowest:
    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: list[tuple[float, str, str, int]] = []

    def add(self, value_N: npt.NDArray[np.float64], rows: pa.RecordBatch) -> None:
        near = np.flatnonzero(~np.isnan(value_N))
        if len(self._kept) == self._size and self._size:
            near = near[value_N[near] <= self._kept[-1][0]]
        if len(near) > self._size > 0:
            near = near[value_N[near] <= np.partition(value_N[near], self._size - 1)[self._size - 1]]
        names = (rows[name].take(pa.array(near)).to_pylist() for name in ("image_id", "shard_id", "position"))
        self._kept = heapq.nsmallest(self._size, [*self._kept, *zip(value_N[near].tolist(), *names, strict=True)])

    def items(self, sign: float = 1.0) -> list[dict[str, Any]]:
        return [
            # Not -0.0 for a value that was 0.
            {"image_id": image_id, "shard_id": shard_id, "position": position, "value": sign * value + 0.0}
            for value, image_id, shard_id, position in self._kept
        ]
