"""What a run left behind: when its first and last rows could be read, and whether they say the same as maskmill's."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from deltalake import DeltaTable

from pipeline.agreement import Agreement
from pipeline.bench.worker import PEER_ROWS, READY, ROWS
from pipeline.errors import MaskmillError, SchemaError
from pipeline.predictions.stored import stored
from pipeline.runfile import read_run
from pipeline.taxonomy import Taxonomy

__all__ = ["Written", "compare", "our_rows", "our_times", "peer_rows", "peer_times"]


@dataclass(frozen=True, kw_only=True)
class Written:
    """first_at, last_at: when the first and the last rows could be read (time.time). images_per_s: between the moment
    at which the first batch was at the model and the last of them."""

    rows: int
    first_at: float
    last_at: float
    images_per_s: float


def peer_times(folder: Path) -> Written:
    """Of a peer's Parquet files, each of which can be read from its last byte on. Raises SchemaError without any."""
    files = [(path.stat().st_mtime, pq.read_metadata(path).num_rows) for path in _files(folder)]
    moments = [moment for moment, rows in files if rows]
    if not moments:
        raise SchemaError(f"{folder} has no rows")
    ready = float((folder / READY).read_text())
    rows = sum(count for _, count in files)
    return Written(
        rows=rows, first_at=min(moments), last_at=max(moments), images_per_s=rows / max(max(moments) - ready, 1e-9)
    )


def our_times(uri: Path) -> Written:
    """Of maskmill's table: rows can be read once they are committed. Its rate is from the first window's start to the
    arrival of the last one's rows at the driver, as run.json says. Raises StorageError, SchemaError."""
    run = read_run(str(uri), {})
    commits = [
        path.stat().st_mtime
        for path in sorted((uri / "_delta_log").glob("*.json"))
        if any("add" in json.loads(line) for line in path.read_text().splitlines() if line)
    ]
    if not commits:
        raise SchemaError(f"{uri} has no rows")
    return Written(
        rows=run["rows"] if "rows" in run else run["images"],
        first_at=min(commits),
        last_at=max(commits),
        images_per_s=run["images"] / max(run["label_s"], 1e-9),
    )


def _files(folder: Path) -> list[Path]:
    return sorted((folder / ROWS).glob("**/*.parquet"))


def peer_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of PEER_ROWS."""
    for path in _files(folder):
        yield from pq.read_table(path, columns=PEER_ROWS.names).to_pylist()


def our_rows(uri: Path) -> Iterator[dict[str, Any]]:
    """The table's rows that are ok, with `key`: the last part of the image id."""
    columns = [name for name in PEER_ROWS.names if name != "key"]
    table = DeltaTable(str(uri)).to_pyarrow_table(columns=["image_id", "status", *columns])
    for row in table.to_pylist():
        if row["status"] == "ok":
            yield {**row, "key": row["image_id"].rpartition("/")[2]}


def compare(
    ours: Mapping[str, Mapping[str, Any]], theirs: Iterator[dict[str, Any]], task: str, taxonomy: Taxonomy
) -> dict[str, Any]:
    """How far a peer's rows are those of maskmill. ours: by key.

    images, missing, strange, twice: in both, only ours, only theirs, theirs more than once. equal: to the last pixel.
    loss, figures: as `Agreement` has them. unlike: images that cannot be compared, as of another size; a cause.
    """
    total, seen = Agreement(), set()
    strange = twice = unlike = 0
    cause = ""
    for row in theirs:
        if row["key"] in seen:
            twice += 1
            continue
        seen.add(row["key"])
        reference = ours.get(row["key"])
        if reference is None:
            strange += 1
            continue
        try:
            total = total.merge(Agreement.of(stored(reference, task), stored(row, task), taxonomy))
        except MaskmillError as error:
            unlike += 1
            cause = cause or f"{type(error).__name__}: {error}"
    return {
        "images": total.images,
        "equal": total.equal,
        "loss": total.loss(taxonomy) if total.images else None,
        "figures": total.figures(taxonomy),
        "missing": len(ours.keys() - seen),
        "strange": strange,
        "twice": twice,
        "unlike": unlike,
        "cause": cause,
    }
