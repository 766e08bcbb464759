"""What tests of predictions share: the way of an evaluation without Ray, from two sections of a config to scores."""

import pickle
from typing import Any

from pipeline.config import EvaluateConfig, PredictionsConfig, ScoreConfig, SourceConfig
from pipeline.predictions.base import Found, PredictionSource, split_payload
from pipeline.predictions.registry import open_predictions
from pipeline.sources.base import Sample, UnitEnd, read_unit
from pipeline.sources.registry import open_source
from pipeline.stages.score import Scorer, score_key
from pipeline.taxonomy import Taxonomy
from pipeline.units import plan_table, row_to_unit

Pairs = list[tuple[Sample, Found | None]]


def sections(source: dict[str, Any], predictions: dict[str, Any]) -> tuple[SourceConfig, PredictionsConfig]:
    """Paths may be given as such."""
    trees = ({k: str(v) if hasattr(v, "parts") else v for k, v in tree.items()} for tree in (source, predictions))
    config = EvaluateConfig.model_validate(dict(zip(("source", "predictions"), trees, strict=True)))
    return config.source, config.predictions


def fingerprints(source: dict[str, Any], predictions: dict[str, Any]) -> list[str]:
    """Of each unit, as the driver plans them."""
    _, plan = prepare(*sections(source, predictions))
    return plan.column("fingerprint").to_pylist()


def prepare(source: SourceConfig, predictions: PredictionsConfig) -> tuple[PredictionSource, Any]:
    opened = open_predictions(predictions, source)
    return opened, opened.prepare(plan_table(open_source(source).plan(images=False)))


def find_all(source: dict[str, Any], predictions: dict[str, Any]) -> tuple[Pairs, list[str] | None]:
    """Every sample with its prediction, as workers find it; and the names that `names` has."""
    source_config, config = sections(source, predictions)
    opened, plan = prepare(source_config, config)
    names = opened.names(config.label)
    worker: PredictionSource = pickle.loads(pickle.dumps(opened))
    pairs: Pairs = []
    for row in plan.to_pylist():
        own, payload = split_payload(row["payload"])
        unit = row_to_unit({**row, "payload": own})
        found = worker.open_unit(unit, payload, config.label)
        for sample in read_unit(open_source(source_config), unit, (), images=False):
            if not isinstance(sample, UnitEnd):
                pairs.append((sample, found.find(sample)))
        assert list(found.unused()) == []
    return pairs, None if names is None else names.to_pylist()


def score_all(pairs: Pairs, taxonomy: Taxonomy, **options: Any) -> list[dict[str, Any]]:
    """The SCORE value of each pair."""
    scorer = Scorer.build(ScoreConfig.model_validate(options), taxonomy, taxonomy, max_pixels=10**7)
    scores = []
    for sample, found in pairs:
        assert found is not None
        assert found.predicted is not None, found.error
        key = score_key(sample.image_id, sample.fields)
        score = scorer.score(found.predicted, sample.targets, key=key, width=found.width, height=found.height)
        assert score is not None
        scores.append(score)
    return scores
