"""The score of one image: the states of every metric that its prediction and target allow, as one Arrow value."""

import pyarrow as pa

from pipeline.metrics.boundary import BOUNDARY
from pipeline.metrics.confusion import CLASS_COUNTS, CONFUSION
from pipeline.metrics.depth import DEPTH_ERRORS
from pipeline.metrics.detection import DETECTION
from pipeline.metrics.panoptic import PANOPTIC

__all__ = ["SCORE"]

# Null where the image has no such pair of prediction and target. `classes` is what IoU needs of `confusion`, summed per
# class, for queries in SQL. error_*: the target was there and could not be held against the prediction.
SCORE = pa.struct(
    [
        ("classes", CLASS_COUNTS),
        ("confusion", CONFUSION),
        ("boundary", BOUNDARY),
        ("panoptic", PANOPTIC),
        ("boundary_panoptic", PANOPTIC),
        ("bbox", DETECTION),
        ("segm", DETECTION),
        ("depth", DEPTH_ERRORS),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
    ]
)
