"""A row of the prediction table as what is scored: the columns decoded."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.masks import decode_depth, decode_label_map, decode_rle
from pipeline.metrics.detection_match import Objects
from pipeline.predictions.base import Predicted

__all__ = ["stored"]


def stored(row: Mapping[str, Any], *, panoptic: bool = False, label_HW: npt.NDArray[Any] | None = None) -> Predicted:
    """The prediction of a row that is ok, as the table holds it: depth as its 16 bits give it back.

    panoptic: the row's segments are disjoint and fill one map. label_HW: its label map, where that is at hand anyway.
    Raises SchemaError where a column is not what the table promises.
    """
    width, height = row["width"], row["height"]
    if row.get("semantic"):
        if label_HW is None:
            semantic = row["semantic"]
            label_HW = decode_label_map(semantic["data"], semantic["format"], width=width, height=height)
        return Predicted(label_HW=label_HW)
    if row.get("segments") is not None:
        if not panoptic:
            return Predicted(objects=Objects.from_segments(row["segments"], height=height, width=width))
        segment_HW = np.zeros((height, width), np.int32)
        for segment in row["segments"]:
            segment_HW[decode_rle(segment["rle"], width=width, height=height)] = segment["id"]
        return Predicted(segment_HW=segment_HW, segments=tuple(row["segments"]))
    if row.get("depth"):
        return Predicted(
            depth_HW=decode_depth(row["depth"], width=width, height=height), depth_kind=row["depth"]["kind"]
        )
    return Predicted()
