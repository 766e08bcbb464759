"""A row of the prediction table as what is scored: the columns decoded."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.masks import decode_depth, decode_label_map, decode_rle
from pipeline.metrics.detection_match import Objects
from pipeline.predictions.base import Predicted

__all__ = ["stored"]


def stored(row: Mapping[str, Any], task: str, *, label_HW: npt.NDArray[Any] | None = None) -> Predicted:
    """The prediction of a row that is ok, as the table holds it: depth as its 16 bits give it back.

    task: the model's; it says what the segments are. label_HW: its label map, where that is at hand anyway.
    Raises SchemaError where a column is not what the table promises.
    """
    width, height = row["width"], row["height"]
    if row.get("depth"):
        return Predicted(
            depth_HW=decode_depth(row["depth"], width=width, height=height), depth_kind=row["depth"]["kind"]
        )
    if label_HW is None and row.get("semantic"):
        semantic = row["semantic"]
        label_HW = decode_label_map(semantic["data"], semantic["format"], width=width, height=height)
    segments = row.get("segments")
    if segments is None:
        return Predicted(label_HW=label_HW)
    if task != "panoptic":
        objects = Objects.from_segments(segments, height=height, width=width, masked=task != "detection")
        return Predicted(label_HW=label_HW, objects=objects)
    segment_HW = np.zeros((height, width), np.int32)
    for segment in segments:
        segment_HW[decode_rle(segment["rle"], width=width, height=height)] = segment["id"]
    return Predicted(label_HW=label_HW, segment_HW=segment_HW, segments=tuple(segments))
