"""Which images two runs can be compared on: those that are ok in both, and what became of all others.

Images are known by 64 bits of a hash of their image_id, kept sorted: 8 bytes an image and run. Two ids of one run with
the same hash are found and refused. Two ids of which either run has only one would pass as the same image: with a
million such ids in each run the chance is 5e-8.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SchemaError
from pipeline.report.bootstrap import Hashes, hash_images
from pipeline.report.notable import Problems
from pipeline.report.rows import OUTCOMES, ScoredTable

__all__ = ["ABSENT", "UNPAIRED", "Index", "Pairing", "Side", "find", "index_rows"]

Side = Literal["a", "b"]
Flags = npt.NDArray[np.bool_]

# The outcome of an image in a run that has no row of it.
ABSENT = "absent"
ERROR = ("error_type", "error_stage", "error_message")
# One row for each image that is not compared and each run in which it is not ok: `lacking_in`. ok_in: a, b or neither.
UNPAIRED = pa.schema(
    [
        ("image_id", pa.string()),
        ("shard_id", pa.string()),
        ("position", pa.int32()),
        ("ok_in", pa.string()),
        ("lacking_in", pa.string()),
        ("outcome", pa.string()),
        *((name, pa.string()) for name in ERROR),
    ]
)


def find(sorted_N: Hashes, wanted_M: Hashes) -> tuple[npt.NDArray[np.intp], Flags]:
    """Where each of `wanted_M` stands in `sorted_N` (ascending), and whether it does."""
    place_M = np.searchsorted(sorted_N, wanted_M)
    inside = place_M < len(sorted_N)
    found_M = inside.copy()
    found_M[inside] = sorted_N[place_M[inside]] == wanted_M[inside]
    return place_M, found_M


@dataclass(frozen=True, eq=False)
class Index:
    """The rows of one run. ok, other: hashes of those that are ok and of the others, ascending. outcomes: how many."""

    ok: Hashes
    other: Hashes
    outcomes: Mapping[str, int]


def index_rows(scored: ScoredTable) -> Index:
    """Read once over a run. Raises SchemaError where two rows are of one image, or of two with the same hash."""
    parts: dict[bool, list[Hashes]] = {True: [np.zeros(0, np.uint64)], False: [np.zeros(0, np.uint64)]}
    outcomes: Counter[str] = Counter()
    for block in scored.blocks():
        hash_N = hash_images(block["image_id"].to_pylist())
        ok_N = _is_ok(block)
        parts[True].append(hash_N[ok_N])
        parts[False].append(hash_N[~ok_N])
        outcomes.update(block["outcome"].to_pylist())
    ok, other = (np.sort(np.concatenate(parts[kind])) for kind in (True, False))
    every = np.sort(np.concatenate([ok, other]))
    twice = every[1:][every[1:] == every[:-1]]
    if len(twice):
        _refuse(scored, int(twice[0]))
    return Index(ok, other, {name: outcomes[name] for name in OUTCOMES})


def _is_ok(block: pa.RecordBatch) -> Flags:
    flags: Flags = pc.equal(block["outcome"], "ok").to_numpy(zero_copy_only=False)
    return flags


def _refuse(scored: ScoredTable, doubled: int) -> NoReturn:
    names = [
        name
        for batch in scored.scan(["image_id"])
        for name, digest in zip(batch["image_id"].to_pylist(), hash_images(batch["image_id"].to_pylist()), strict=True)
        if digest == doubled
    ]
    where = f"{scored.table.uri}, model {scored.model['label']}"
    if names[0] == names[1]:
        raise SchemaError(f"expected each image once, got two rows of {names[0]!r} in {where}")
    raise SchemaError(f"the image_ids {names[0]!r} and {names[1]!r} of {where} have the same 64-bit hash")


class Pairing:
    """The images that are ok in both runs, and a record of the others."""

    def __init__(self, a: Index, b: Index) -> None:
        self._index: Mapping[Side, Index] = {"a": a, "b": b}
        self.common: Hashes = np.intersect1d(a.ok, b.ok, assume_unique=True)
        self._problems = {
            (ok_in, lacking_in): Problems()
            for ok_in, lacking_in in (("a", "b"), ("b", "a"), ("neither", "a"), ("neither", "b"))
        }

    def take(self, side: Side, block: pa.RecordBatch) -> tuple[npt.NDArray[np.intp], pa.RecordBatch, pa.RecordBatch]:
        """Of a block (`ScoredTable.blocks`) of one run the rows that are compared, with the place of each in `common`,
        and UNPAIRED of the others, which are booked for `problems`. Each row is to be taken once."""
        hash_N = hash_images(block["image_id"].to_pylist())
        place_N, common_N = find(self.common, hash_N)
        other_side: Side = "b" if side == "a" else "a"
        other = self._index[other_side]
        ok_N, ok_there_N = _is_ok(block), find(other.ok, hash_N)[1]
        absent_N = ~ok_there_N & ~find(other.other, hash_N)[1]
        parts = [
            self._book(block, ~ok_N, np.where(ok_there_N, other_side, "neither"), side),
            self._book(_as_absent(block), absent_N, np.where(ok_N, side, "neither"), other_side),
        ]
        return place_N[common_N], block.filter(pa.array(common_N)), pa.concat_batches(parts)

    def _book(
        self, block: pa.RecordBatch, chosen_N: Flags, ok_in_N: npt.NDArray[np.str_], lacking_in: Side
    ) -> pa.RecordBatch:
        columns = {name: block[name] for name in ("image_id", "shard_id", "position", "outcome", *ERROR)} | {
            "ok_in": pa.array(ok_in_N.tolist(), pa.string()),
            "lacking_in": pa.array([lacking_in] * len(block), pa.string()),
        }
        arrays = [columns[field.name].cast(field.type) for field in UNPAIRED]
        rows = pa.RecordBatch.from_arrays(arrays, schema=UNPAIRED).filter(pa.array(chosen_N))
        for ok_in in pc.unique(rows["ok_in"]).to_pylist():
            self._problems[ok_in, lacking_in].add(rows.filter(pc.equal(rows["ok_in"], ok_in)))
        return rows

    def counts(self) -> dict[str, Any]:
        """Images by where they are ok, and the outcomes of each run."""
        a, b = self._index["a"], self._index["b"]
        neither = np.union1d(a.other[~find(b.ok, a.other)[1]], b.other[~find(a.ok, b.other)[1]])
        common = len(self.common)
        return {
            "common": common,
            "only_a": len(a.ok) - common,
            "only_b": len(b.ok) - common,
            "neither": len(neither),
            "a": {"images": sum(a.outcomes.values()), **a.outcomes},
            "b": {"images": sum(b.outcomes.values()), **b.outcomes},
        }

    def problems(self) -> list[dict[str, Any]]:
        """[{ok_in, lacking_in, outcome, type, stage, count, examples: [{image_id, message}]}], once all rows are taken.

        An image that is ok in neither stands here twice, once for each run.
        """
        return [
            {"ok_in": ok_in, "lacking_in": lacking_in, **problem}
            for (ok_in, lacking_in), problems in self._problems.items()
            for problem in problems.compute()
        ]


def _as_absent(block: pa.RecordBatch) -> pa.RecordBatch:
    """The rows as what the other run, which has none of them, says of them."""
    said = {"outcome": ABSENT} | dict.fromkeys(ERROR, "")
    columns = {
        name: pa.array([said[name]] * len(block), pa.string()) if name in said else block[name]
        for name in ("image_id", "shard_id", "position", "outcome", *ERROR)
    }
    return pa.RecordBatch.from_pydict(columns)
