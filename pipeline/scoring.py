"""How the models of a run are scored: the label space of the targets, and each model's way into it."""

import hashlib
import json
from collections.abc import MutableMapping, Sequence
from typing import Any

from pipeline.config import (
    EvaluateConfig,
    FilesSource,
    ParquetSource,
    ScenesSource,
    ScoreConfig,
    SourceConfig,
    TableSource,
)
from pipeline.errors import ConfigError
from pipeline.predictions.base import PredictionSource
from pipeline.sources.coco import categories_of
from pipeline.sources.table import table_model
from pipeline.stages.score import Scorer
from pipeline.taxonomy import Category, Taxonomy, build_taxonomy, load_taxonomy

__all__ = ["evaluated_models", "has_targets", "options_version", "plan_scorers", "target_taxonomy"]

# Part of the version of every score that `evaluate` writes: raise it whenever a figure of the same input changes.
SCORE_VERSION = 1
# Depth has no label space, and a run's models each have one.
NO_CLASSES = Taxonomy("depth", "depth has no classes", (Category(0, "depth", "stuff", (128, 128, 128)),))


def has_targets(source: SourceConfig) -> bool:
    """False where the config alone says that there are none. Tars may have them or not."""
    if isinstance(source, FilesSource | ScenesSource):
        return bool(source.targets)
    return bool(source.target_columns) if isinstance(source, ParquetSource) else True


def target_taxonomy(score: ScoreConfig, source: SourceConfig) -> Taxonomy | None:
    """The label space of the targets as far as config or annotation files say; None: that of whatever is scored."""
    if score.taxonomy is not None:
        return load_taxonomy(score.taxonomy)
    if isinstance(source, ScenesSource):
        return load_taxonomy("scenes")
    if isinstance(source, TableSource):
        return build_taxonomy(table_model(source)["taxonomy"], f"{source.uri}/run.json")
    return categories_of(source)


def plan_scorers(
    score: ScoreConfig | None, source: SourceConfig, models: Sequence[MutableMapping[str, Any]], *, asked: bool
) -> tuple[list[Scorer | None], list[str]]:
    """A scorer for each model, and what there is to say about models without one.

    models: `LoadedModel.describe()` of each; `score_taxonomy` and `mapping` are added where it is scored. asked:
    whether the user asked for scores; then a model that cannot be scored raises ConfigError.
    """
    if score is None or not has_targets(source):
        return [None] * len(models), []
    target = target_taxonomy(score, source)
    scorers: list[Scorer | None] = []
    notes: list[str] = []
    for model in models:
        pred = build_taxonomy(model["taxonomy"], "the model's taxonomy")
        try:
            scorer = Scorer.build(score, pred, target or pred, max_pixels=source.max_pixels)
        except ConfigError as error:
            if asked:
                raise ConfigError(f"model {model['label']} cannot be scored: {error}") from error
            notes.append(f"model {model['label']} is not scored: {error}")
            scorers.append(None)
            continue
        model["score_taxonomy"] = scorer.target.describe()
        model["mapping"] = scorer.mapping.describe() if scorer.mapping else None
        scorers.append(scorer)
    return scorers, notes


def evaluated_models(
    config: EvaluateConfig, predictions: PredictionSource
) -> tuple[list[dict[str, Any]], list[Scorer]]:
    """The models of an evaluation as run.json has them, and how each is scored.

    Their `version` is that of the rows: the predictions' and, after a dot, of the scoring options. Raises ConfigError.
    """
    target = target_taxonomy(config.score, config.source)
    given = None if config.predictions.taxonomy is None else load_taxonomy(config.predictions.taxonomy)
    models: list[dict[str, Any]] = []
    scorers: list[Scorer] = []
    for model in predictions.models():
        pred = given or model.taxonomy or target
        if pred is None and config.predictions.format == "depth":
            pred = NO_CLASSES
        if pred is None:
            raise ConfigError(
                "score.taxonomy must be given: neither the targets nor the predictions say what their ids mean"
            )
        scorer = Scorer.build(config.score, pred, target or pred, max_pixels=config.source.max_pixels)
        version = f"{model.version}.{options_version(scorer)}" if model.version else options_version(scorer)
        models.append(
            {
                "task": config.predictions.format,
                **model.description,
                "label": model.label,
                "version": version,
                "prediction_version": model.version,
                "taxonomy": pred.describe(),
                "score_taxonomy": scorer.target.describe(),
                "mapping": scorer.mapping.describe() if scorer.mapping else None,
            }
        )
        scorers.append(scorer)
    return models, scorers


def options_version(scorer: Scorer) -> str:
    """A hash of everything that turns a prediction and a target into a score."""
    pairs = None if scorer.mapping is None else [*scorer.mapping.pairs.items(), scorer.mapping.other_id]
    parts = [SCORE_VERSION, scorer.options.model_dump(mode="json"), scorer.target.describe(), pairs]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=4).hexdigest()
