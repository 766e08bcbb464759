"""The worst and best images of a report, read again from the source, with their targets and predictions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from pipeline.config import PredictionsConfig, ScoreConfig, SourceConfig
from pipeline.configfile import source_from
from pipeline.errors import ConfigError
from pipeline.predictions.base import Found, UnitPredictions, split_payload
from pipeline.predictions.registry import open_predictions
from pipeline.preview import read_images
from pipeline.report.gallery import Picture, collect_pictures
from pipeline.report.rows import ScoredTable
from pipeline.sources.base import Sample
from pipeline.sources.registry import open_source
from pipeline.stages.score import Scorer
from pipeline.taxonomy import build_taxonomy
from pipeline.units import plan_table, row_to_unit

__all__ = ["Described", "describe_run", "draw", "read_entries", "report_pictures"]

# One figure of each section, the first that a report has.
SHOWN = (("semantic.mIoU",), ("panoptic.PQ",), ("detection.segm.F1", "detection.bbox.F1"), ("depth.AbsRel",))

Place = tuple[str, int]


def report_pictures(
    report: Mapping[str, Any], scored: ScoredTable, overrides: Mapping[str, Any]
) -> dict[str, list[Picture]]:
    """Pictures by `worst:FIGURE` and `best:FIGURE`, as `render_page` takes them, for one figure of each section.

    overrides: `source` and `predictions` as in a config, what of them is not as run.json has it; it keeps no
    credentials. Raises ConfigError where the source or the predictions are no longer described well, StorageError.
    """
    lists = {
        f"{end}:{figure}": report[end][figure]
        for figures in SHOWN
        for figure in next(([name] for name in figures if name in report["worst"]), [])
        for end in ("worst", "best")
    }
    entries: dict[Place, Mapping[str, Any]] = {_place(entry): entry for found in lists.values() for entry in found}
    if not entries:
        return {}
    described = describe_run(scored, overrides)
    listed = list(entries.values())
    drawn = dict(zip(entries, draw(listed, read_entries(described.source, listed), scored, described), strict=True))
    return {
        key: [replace(drawn[_place(entry)], value=entry["value"]) for entry in found] for key, found in lists.items()
    }


def read_entries(source: SourceConfig, entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Sample, int]]:
    """`read_images`, without images where the source has targets alone: COCO files without their folder."""
    try:
        next(open_source(source).plan(), None)
    except ConfigError:
        return read_images(source, entries, images=False)
    return read_images(source, entries)


def _place(entry: Mapping[str, Any]) -> Place:
    return entry["shard_id"], entry["position"]


class Described(NamedTuple):
    """Where the targets and predictions of a run come from, and how it was scored."""

    source: SourceConfig
    predictions: PredictionsConfig
    score: ScoreConfig


def describe_run(scored: ScoredTable, overrides: Mapping[str, Any]) -> Described:
    """What run.json says, with `overrides` as in `report_pictures`. Raises ConfigError."""
    config = scored.run.get("config") or {}
    if "source" not in config:
        raise ConfigError(f"{scored.table.uri}/run.json does not say what the source was")
    own = {"uri": scored.table.uri} if scored.run.get("job") != "evaluate" else config.get("predictions") or {}
    try:
        return Described(
            source_from({**config["source"], "storage": {}, **overrides.get("source", {})}),
            PredictionsConfig.model_validate(
                {**own, "storage": scored.table.storage, **overrides.get("predictions", {})}
            ),
            ScoreConfig.model_validate(config.get("score") or {}),
        )
    except ValidationError as error:
        raise ConfigError(f"run.json does not hold a config: {' '.join(str(error).split())[:300]}") from error


def draw(
    entries: Sequence[Mapping[str, Any]],
    samples: Iterable[tuple[Sample, int]],
    scored: ScoredTable,
    described: Described,
) -> list[Picture]:
    """A picture of each entry (image_id, shard_id, position, value), as `collect_pictures` draws it."""
    source, predictions, score = described
    model = scored.model
    pred = build_taxonomy(model.get("taxonomy") or scored.taxonomy.describe(), "run.json")
    scorer = Scorer.build(score, pred, scored.taxonomy, max_pixels=source.max_pixels)
    find = _Finder(source, predictions, model["label"], {str(entry["shard_id"]) for entry in entries})
    return collect_pictures(entries, samples, find, scorer)


class _Finder:
    """The prediction of a sample."""

    def __init__(self, source: SourceConfig, config: PredictionsConfig, label: str, shard_ids: set[str]) -> None:
        self._predictions = open_predictions(config, source)
        self._predictions.models()
        self._label = label
        plan = self._predictions.prepare(plan_table(open_source(source).plan(images=False)))
        wanted = pc.is_in(plan.column("shard_id"), value_set=pa.array(sorted(shard_ids), pa.string()))
        self._units = {row["shard_id"]: row for row in plan.filter(wanted).to_pylist()}
        self._opened: dict[str, UnitPredictions] = {}

    def __call__(self, sample: Sample) -> Found | None:
        if sample.shard_id not in self._opened:
            row = self._units[sample.shard_id]
            own, payload = split_payload(row["payload"])
            unit = row_to_unit({**row, "payload": own})
            self._opened[sample.shard_id] = self._predictions.open_unit(unit, payload, self._label)
        return self._opened[sample.shard_id].find(sample)
