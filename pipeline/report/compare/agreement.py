"""Two models without a target: the scores of B held against A folded into agreement, and where they agree least."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc
from pydantic import ValidationError

from pipeline.config import ScoreConfig
from pipeline.errors import ConfigError
from pipeline.report.compare.comparison import COMPARE_FILE, FORMAT, CompareOptions, clear_folder
from pipeline.report.compare.runs import settings, states
from pipeline.report.fold import Fold
from pipeline.report.report import encode, plain, provenance
from pipeline.report.rows import ScoredTable
from pipeline.report.tables import CELLS, class_rows, confusion_rows, row_tables, write_rows
from pipeline.storage import join, open_fs, storage_errors

__all__ = ["agreement_score", "write_agreement"]

MAX_NAMES = 12


def agreement_score(given: Mapping[str, Any], a: ScoredTable, b: ScoredTable) -> ScoreConfig:
    """How B is held against A: the `score` section that is given, with depth fitted where it is not in metres.

    Relative depth has no unit, and inverse depth no zero: the first is fitted in depth, the second in disparity.
    """
    depth = dict(given.get("depth") or {})
    kinds = {_depth_kind(a), _depth_kind(b)}
    if "alignment" not in depth and kinds & {"relative", "inverse_relative"}:
        depth["alignment"] = "least_squares_disparity" if "inverse_relative" in kinds else "least_squares"
    try:
        return ScoreConfig.model_validate({**given, "depth": depth})
    except ValidationError as error:
        raise ConfigError(f"score: {' '.join(str(error).split())[:300]}") from error


def _depth_kind(side: ScoredTable) -> str | None:
    """Of the first depth map of a model, None where it has none."""
    if side.model.get("task") != "depth":
        return None
    for batch in side.scan(["depth"]):
        kinds = pc.struct_field(batch["depth"], "kind").drop_null()
        if len(kinds):
            return str(kinds[0].as_py())
    return None


def write_agreement(
    a: ScoredTable,
    b: ScoredTable,
    scored: ScoredTable,
    uri: str,
    storage: Mapping[str, Any],
    options: CompareOptions | None = None,
) -> dict[str, Any]:
    """Fold the agreement of B with A into the folder `uri`: compare.json and its tables. Returns what compare.json
    holds.

    a, b: whose predictions. scored: B with those of A as its targets. Raises SchemaError, StorageError.
    """
    options = options or CompareOptions()
    fold = Fold(scored.taxonomy, images=options.images, replicates=options.replicates, seed=options.seed)
    fs, folder = open_fs(uri, storage)
    clear_folder(fs, folder, uri)
    with row_tables(fs, folder) as tables:
        for block in scored.blocks():
            tables.add(block, fold.add(block))
    agreement: dict[str, Any] = plain(fold.report())
    run_a, run_b = provenance(a), provenance(b)
    worst = agreement.pop("worst")
    del agreement["best"]
    mapping = scored.model.get("mapping")
    comparison: dict[str, Any] = {
        "format": FORMAT,
        "a": run_a,
        "b": run_b,
        "settings": settings(run_a, run_b),
        "warnings": [*_lost(mapping), *_fitted(scored, a, b), *states(run_a, run_b)],
        "taxonomy": scored.taxonomy.name,
        "mapping": mapping,
        "score": scored.run["config"]["score"],
        "agreement": agreement,
        "disagreement": worst,
    }
    write_rows(fs, join(folder, "per_class.parquet"), class_rows(agreement, scored.taxonomy))
    if "confusion" in agreement.get("semantic", {}):
        write_rows(fs, join(folder, "confusion.parquet"), confusion_rows(agreement["semantic"]["confusion"]), CELLS)
    with storage_errors(uri):
        fs.pipe_file(join(folder, COMPARE_FILE), encode(comparison).encode())
    return comparison


def _lost(mapping: Mapping[str, Any] | None) -> Iterator[str]:
    """What of the label spaces cannot be compared."""
    if not mapping:
        return
    unmapped, unused = mapping.get("unmapped") or [], mapping.get("unused") or []
    if unmapped:
        yield f"Classes of B that A does not have count as {mapping['unmapped_become']}: {_listed(unmapped)}."
    if unused:
        yield f"No class of B counts as these of A, which so agree nowhere: {_listed(unused)}."


def _fitted(scored: ScoredTable, a: ScoredTable, b: ScoredTable) -> Iterator[str]:
    """What depth that is not in metres means for the figures."""
    kinds = [_depth_kind(side) for side in (a, b)]
    if {*kinds} - {"metric_m", None}:
        alignment = scored.run["config"]["score"]["depth"]["alignment"]
        yield (
            f"Depth is {kinds[0]} in A and {kinds[1]} in B (alignment: {alignment}); what has a unit is in that of A."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:MAX_NAMES])) + (
        f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    )
