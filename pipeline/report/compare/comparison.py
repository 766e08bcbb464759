"""Two runs over the same images: both folded over the images that are ok in both, and the difference of every figure.

A bootstrap replicate weights an image by its image_id alone, so replicate b of A and of B are of the same images: their
difference is a replicate of the difference, and its percentiles are a paired interval.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.metrics.score import SCORE
from pipeline.report.bootstrap import LEVEL
from pipeline.report.compare.figures import class_differences, class_rows, differences
from pipeline.report.compare.images import CHANGES, ImageChanges
from pipeline.report.compare.pairs import UNPAIRED, Pairing, Side, index_rows
from pipeline.report.compare.runs import settings, warnings
from pipeline.report.figures import image_figures
from pipeline.report.fold import METHOD
from pipeline.report.replicates import Replicates
from pipeline.report.report import PAGE_FILE, encode, plain, provenance
from pipeline.report.rows import ScoredTable
from pipeline.report.states import States
from pipeline.report.tables import write_rows
from pipeline.storage import join, open_fs, storage_errors
from pipeline.taxonomy import Taxonomy

__all__ = ["COMPARE_FILE", "FORMAT", "CompareOptions", "check_comparable", "clear_folder", "write_comparison"]

Floats = npt.NDArray[np.float64]
Tree = Mapping[str, Any]

FORMAT = 1
COMPARE_FILE = "compare.json"


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """replicates: of the bootstrap, 0 for none. images: how many that changed most are listed, in each direction."""

    replicates: int = 1000
    images: int = 8
    seed: int = 0


def check_comparable(a: ScoredTable, b: ScoredTable) -> None:
    """Raises ConfigError where the scores of both are not in the same label space."""
    classes_a, classes_b = ({(c.id, c.name, c.kind) for c in side.taxonomy.categories} for side in (a, b))
    if classes_a != classes_b:
        id_, name, _ = min(classes_a ^ classes_b)
        raise ConfigError(
            f"expected scores in one label space, got {a.taxonomy.name} of {_who(a)} and {b.taxonomy.name} of "
            f"{_who(b)}, which differ in {len(classes_a ^ classes_b)} classes such as {name} ({id_}); score both "
            "against the same targets with one score.taxonomy, or hold one model against the other with --agreement"
        )


def _who(side: ScoredTable) -> str:
    return f"{side.model['label']} in {side.table.uri}"


class _Folded:
    """One run over the common images."""

    def __init__(self, taxonomy: Taxonomy, options: CompareOptions) -> None:
        self._states = States(taxonomy, confusion=False)
        self._replicates = Replicates(taxonomy, options.replicates, options.seed) if options.replicates else None
        self.scores: Counter[str] = Counter()

    def add(self, rows: pa.RecordBatch) -> dict[str, Floats]:
        """Add rows; figures of each image."""
        self._states.add(rows["score"])
        if self._replicates is not None:
            self._replicates.add(rows["image_id"].to_pylist(), rows["score"])
        for name, column in zip(SCORE.names, rows["score"].flatten(), strict=True):
            self.scores[name] += len(column) - column.null_count
        return image_figures(rows["score"])

    def finish(self) -> None:
        """Once all rows were added: their sections, and the replicates of figures and of classes."""
        detections = self._states.detections()
        self.sections: Tree = self._states.sections(detections)
        self.replicates: Mapping[str, Floats] = {}
        self.class_replicates: Mapping[str, Floats] = {}
        if self._replicates is not None:
            self.replicates = self._replicates.values(detections)
            self.class_replicates = self._replicates.class_values()


def write_comparison(
    a: ScoredTable, b: ScoredTable, uri: str, storage: Mapping[str, Any], options: CompareOptions | None = None
) -> dict[str, Any]:
    """Compare B with A into the folder `uri`: compare.json and its tables. Returns what compare.json holds.

    The same rows give the same bytes of compare.json, whatever files they stand in. Raises ConfigError where there is
    nothing to compare, SchemaError for rows that are not as they should be, StorageError.
    """
    options = options or CompareOptions()
    check_comparable(a, b)
    pairing = Pairing(index_rows(a), index_rows(b))
    counts = pairing.counts()
    if not counts["common"]:
        raise ConfigError(
            f"no image is ok in both: {counts['a']['ok']} of {counts['a']['images']} are in {_who(a)}, "
            f"{counts['b']['ok']} of {counts['b']['images']} in {_who(b)}; images are the same where their image_id is"
        )
    fs, folder = open_fs(uri, storage)
    clear_folder(fs, folder, uri)
    sides = {"a": _Folded(a.taxonomy, options), "b": _Folded(a.taxonomy, options)}
    changes = ImageChanges(pairing.common, options.images)
    with _tables(fs, folder, uri) as (images, problems):
        for place_N, rows, others in _taken("a", a, pairing):
            changes.add_a(place_N, sides["a"].add(rows))
            problems.write_batch(others)
        for place_N, rows, others in _taken("b", b, pairing):
            images.write_table(changes.add_b(place_N, sides["b"].add(rows), rows))
            problems.write_batch(others)
    for side in sides.values():
        side.finish()
    folded_a, folded_b = sides["a"], sides["b"]
    sections = (folded_a.sections, folded_b.sections)
    replicates = (folded_a.replicates, folded_b.replicates)
    of_classes = (folded_a.class_replicates, folded_b.class_replicates)
    run_a, run_b = provenance(a), provenance(b)
    comparison: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "a": run_a,
            "b": run_b,
            "settings": settings(run_a, run_b),
            "warnings": [*warnings(run_a, run_b), *_uneven(folded_a, folded_b)],
            "counts": counts,
            "problems": pairing.problems(),
            "figures": differences(*sections, *replicates),
            "per_class": class_differences(*sections, *of_classes),
            "images": changes.compute(),
            "bootstrap": _bootstrap(options, replicates),
        }
    )
    if not comparison["figures"]:
        raise ConfigError(
            f"expected figures that both have, got {', '.join(folded_a.sections) or 'none'} of {_who(a)} and "
            f"{', '.join(folded_b.sections) or 'none'} of {_who(b)}; --agreement holds one model against the other"
        )
    write_rows(fs, join(folder, "per_class.parquet"), class_rows(comparison["per_class"], a.taxonomy))
    with storage_errors(uri):
        fs.pipe_file(join(folder, COMPARE_FILE), encode(comparison).encode())
    return comparison


def _bootstrap(options: CompareOptions, replicates: tuple[Mapping[str, Floats], ...]) -> dict[str, Any]:
    """As a report has it: `replicates_of` names the sections with fewer replicates."""
    bootstrap = {"replicates": options.replicates, "level": LEVEL, "method": METHOD, "seed": options.seed}
    fewer = {
        path.rpartition(".")[0]: min(len(side[path]) for side in replicates if path in side)
        for path in sorted({path for side in replicates for path in side})
    }
    fewer = {section: count for section, count in fewer.items() if count < options.replicates}
    return bootstrap | ({"replicates_of": fewer} if fewer else {})


def _taken(
    side: Side, scored: ScoredTable, pairing: Pairing
) -> Iterator[tuple[npt.NDArray[np.intp], pa.RecordBatch, pa.RecordBatch]]:
    for block in scored.blocks():
        yield pairing.take(side, block)


def _uneven(a: _Folded, b: _Folded) -> Iterator[str]:
    """Images that are ok in both, but of which one run has a kind of score that the other lacks."""
    for name, scores in a.scores.items():
        if scores and b.scores[name] not in (0, scores):
            yield f"Of the images that are compared, A has {scores} scores of the kind {name} and B {b.scores[name]}."


def clear_folder(fs: fsspec.AbstractFileSystem, folder: str, uri: str) -> None:
    """Make the folder; of an earlier comparison in it nothing stays beside the new one. Raises StorageError."""
    with storage_errors(uri):
        fs.makedirs(folder, exist_ok=True)
        for name in (
            COMPARE_FILE,
            PAGE_FILE,
            "images.parquet",
            "problems.parquet",
            "per_class.parquet",
            "confusion.parquet",
        ):
            if fs.exists(join(folder, name)):
                fs.rm_file(join(folder, name))


@contextmanager
def _tables(
    fs: fsspec.AbstractFileSystem, folder: str, uri: str
) -> Iterator[tuple[pq.ParquetWriter, pq.ParquetWriter]]:
    """images.parquet and problems.parquet."""
    with storage_errors(uri), ExitStack() as stack:
        writers = []
        for name, schema in (("images", CHANGES), ("problems", UNPAIRED)):
            file = stack.enter_context(fs.open(join(folder, f"{name}.parquet"), "wb"))
            writers.append(stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd")))
        yield writers[0], writers[1]
