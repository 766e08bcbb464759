"""Whole-number sums per class, the shape that most states share: they add up to the same bits in any order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SchemaError

__all__ = ["ClassSums", "class_sums_type", "flat_lists", "ratio"]


def class_sums_type(fields: tuple[str, ...]) -> pa.DataType:
    """The Arrow type of a row: `classes`, one entry per class that occurs, ascending by `category_id`."""
    entry = pa.struct([("category_id", pa.int32()), *((field, pa.int64()) for field in fields)])
    return pa.struct([("classes", pa.list_(entry))])


def ratio(numerator: npt.NDArray[Any], denominator: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """numerator / denominator, NaN where the denominator is 0."""
    values = np.full(len(denominator), np.nan)
    np.divide(numerator, denominator, out=values, where=denominator != 0)
    return values


def flat_lists(lists: pa.Array) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """The items of a column of lists one after the other, and the row of each; a null row has none."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    # Not list_parent_indices: it counts what lies under a null as well.
    return np.repeat(np.arange(len(lists)), lengths), pc.list_flatten(lists)


@dataclass(frozen=True, eq=False)
class ClassSums:
    """category_id: (N,) int64, ascending, only classes that occur. sums: (N, fields) int64, one row per class.

    A subclass names its columns in `FIELDS` and says what they mean. Both arrays are read-only.
    """

    category_id: npt.NDArray[np.int64]
    sums: npt.NDArray[np.int64]
    FIELDS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self.category_id.flags.writeable = False
        self.sums.flags.writeable = False

    @classmethod
    def empty(cls) -> Self:
        """The identity of `merge`."""
        return cls(np.zeros(0, np.int64), np.zeros((0, len(cls.FIELDS)), np.int64))

    @classmethod
    def from_entries(cls, category_id: npt.NDArray[np.integer[Any]], sums: npt.NDArray[np.int64]) -> Self:
        """From entries in any order, where a class may occur several times or with nothing but zeros."""
        ids, index = np.unique(category_id, return_inverse=True)
        totals = np.zeros((len(ids), len(cls.FIELDS)), np.int64)
        np.add.at(totals, index, sums)
        kept = totals.any(axis=1)
        return cls(ids[kept].astype(np.int64), totals[kept])

    def merge(self, other: Self) -> Self:
        """The state of both parts' images together."""
        return self.from_entries(
            np.concatenate([self.category_id, other.category_id]), np.concatenate([self.sums, other.sums])
        )

    def column(self, field: str) -> npt.NDArray[np.int64]:
        """One of `FIELDS`, (N,) int64."""
        return self.sums[:, self.FIELDS.index(field)]

    def to_row(self) -> dict[str, Any]:
        """Plain values of `class_sums_type(FIELDS)`; `from_row` gives the same state back."""
        names = ("category_id", *self.FIELDS)
        entries = zip(self.category_id.tolist(), *self.sums.T.tolist(), strict=True)
        return {"classes": [dict(zip(names, entry, strict=True)) for entry in entries]}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        try:
            entries = [[entry[field] for field in ("category_id", *cls.FIELDS)] for entry in row["classes"]]
        except (KeyError, TypeError) as error:
            raise SchemaError(f"expected a row of {', '.join(cls.FIELDS)} per class, got {str(row)[:100]}") from error
        table = np.array(entries, np.int64).reshape(len(entries), 1 + len(cls.FIELDS))
        return cls.from_entries(table[:, 0], table[:, 1:])

    @classmethod
    def from_rows(cls, rows: pa.Array | pa.ChunkedArray) -> Self:
        """All rows of a column merged, without a Python object per row; null rows count as empty."""
        _, category_id, sums = cls.entries(rows)
        return cls.from_entries(category_id, sums)

    @classmethod
    def entries(
        cls, rows: pa.Array | pa.ChunkedArray
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """What a column's rows hold, (E) each: the row, ascending, the category, and its sums (E, fields).

        Raises SchemaError for a column of another type or with nulls inside a row.
        """
        if isinstance(rows, pa.ChunkedArray):
            rows = rows.combine_chunks()
        expected = class_sums_type(cls.FIELDS)
        if rows.type != expected:
            raise SchemaError(f"expected a column of {expected}, got {rows.type}")
        row, found = flat_lists(pc.struct_field(rows, "classes"))
        columns = [pc.struct_field(found, name) for name in ("category_id", *cls.FIELDS)]
        if any(column.null_count for column in columns):
            raise SchemaError(f"expected {', '.join(cls.FIELDS)} of each class, got nulls")
        category_id, *sums = (column.to_numpy(zero_copy_only=False).astype(np.int64) for column in columns)
        return row, category_id, np.stack(sums, axis=1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return np.array_equal(self.category_id, other.category_id) and np.array_equal(self.sums, other.sums)

    def __hash__(self) -> int:
        return hash((self.category_id.tobytes(), self.sums.tobytes()))
