"""The formats that predictions may have."""

from collections.abc import Callable
from typing import Any

from pipeline.config import CocoSource, PredictionsConfig, SourceConfig
from pipeline.errors import ConfigError
from pipeline.predictions.base import PredictionSource
from pipeline.predictions.coco import CocoPredictions
from pipeline.predictions.files import FilePredictions
from pipeline.predictions.panoptic import PanopticPredictions
from pipeline.predictions.table import TablePredictions

__all__ = ["PREDICTIONS", "open_predictions"]

PREDICTIONS: dict[str, Callable[[PredictionsConfig, Any], PredictionSource]] = {
    "table": TablePredictions,
    "coco": CocoPredictions,
    "panoptic": PanopticPredictions,
    "files": FilePredictions,
    "depth": FilePredictions,
}
# Fields that other formats would pass over in silence.
OWN_FIELDS = {"models": "table", "match": "table", "masks": "panoptic", "scale": "depth", "kind": "depth"}
# The annotation file of a COCO source that predictions belong to.
TARGET_FILES = {"coco": "instances", "panoptic": "panoptic"}


def open_predictions(config: PredictionsConfig, source: SourceConfig) -> PredictionSource:
    """The predictions that `config` describes. Opens nothing; raises ConfigError where they cannot fit `source`."""
    for name, form in OWN_FIELDS.items():
        if config.format != form and getattr(config, name) != PredictionsConfig.model_fields[name].default:
            raise ConfigError(f"predictions.{name} is of predictions.format {form}, got format {config.format}")
    needed = TARGET_FILES.get(config.format)
    if needed and getattr(source if isinstance(source, CocoSource) else None, needed, None) is None:
        raise ConfigError(
            f"predictions.format {config.format} needs source.format coco with source.{needed}, the JSON file of the "
            f"targets; got source.format {source.format}"
        )
    return PREDICTIONS[config.format](config, source)
