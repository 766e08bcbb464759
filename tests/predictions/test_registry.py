"""Which predictions may be held against which source."""

import pickle
from typing import Any, get_args

import pytest
from prediction_helpers import sections

from pipeline.config import PredictionsConfig
from pipeline.errors import ConfigError
from pipeline.predictions.registry import PREDICTIONS, open_predictions

FILES = {"format": "files", "uri": "img"}
COCO = {"format": "coco", "instances": "i.json", "panoptic": "p.json"}


def test_the_registry_knows_every_format() -> None:
    assert set(PREDICTIONS) == set(get_args(PredictionsConfig.model_fields["format"].annotation))


@pytest.mark.parametrize(
    ("format", "source", "task"),
    [
        ("coco", COCO, "instance"),
        ("panoptic", COCO, "panoptic"),
        ("files", FILES, "semantic"),
        ("depth", FILES, "depth"),
    ],
)
def test_what_others_made_is_one_model_in_the_targets_space(format: str, source: dict[str, Any], task: str) -> None:
    source_config, config = sections(source, {"format": format, "uri": "x", "label": "theirs"})
    opened = open_predictions(config, source_config)
    (model,) = opened.models()
    assert (model.label, model.version, model.taxonomy) == ("theirs", "", None)
    assert model.description == {"task": task, "uri": "x"}
    assert pickle.loads(pickle.dumps(opened)) == opened


@pytest.mark.parametrize(
    ("predictions", "source", "message"),
    [
        ({"format": "coco"}, FILES, r"format coco needs source.format coco with source.instances.*got .* files"),
        ({"format": "coco"}, {"format": "coco", "panoptic": "p.json"}, r"with source\.instances"),
        ({"format": "panoptic"}, FILES, r"format panoptic needs source.format coco with source.panoptic"),
        ({"format": "panoptic"}, {"format": "coco", "instances": "i.json"}, r"with source\.panoptic"),
        ({"format": "coco", "masks": "m"}, COCO, r"predictions.masks is of .*format panoptic, got format coco"),
        ({"format": "files", "kind": "relative"}, FILES, r"predictions.kind is of .*format depth, got format files"),
        ({"format": "files", "scale": 0.5}, FILES, r"predictions.scale is of predictions.format depth"),
        ({"format": "depth", "models": ["m"]}, FILES, r"predictions.models is of predictions.format table"),
        ({"format": "coco", "match": "name"}, COCO, r"predictions.match is of predictions.format table"),
    ],
)
def test_combinations_that_cannot_work(predictions: dict[str, Any], source: dict[str, Any], message: str) -> None:
    source_config, config = sections(source, {"uri": "x", **predictions})
    with pytest.raises(ConfigError, match=message):
        open_predictions(config, source_config)
