"""The rows of the two tables: predictions, and the scores of predictions that were evaluated after they were made.

`model` is the partition column of both: part of the table, not of its files. A scores table has the columns of its
predictions that say whose row it is, and no masks.
"""

import pyarrow as pa

from pipeline.metrics.score import SCORE
from pipeline.schema import DEPTH, FIELDS, MODEL, QUALITY, SEGMENTS, SEMANTIC

__all__ = ["LATER", "PREDICTIONS", "SCORES"]

IDENTITY = [("image_id", pa.string()), ("shard_id", pa.string()), ("position", pa.int32())]
STATE = [
    ("width", pa.int32()),
    ("height", pa.int32()),
    (MODEL, pa.string()),
    ("model_version", pa.string()),
    ("status", pa.string()),
    ("error_type", pa.string()),
    ("error_stage", pa.string()),
    ("error_message", pa.string()),
    ("attempts", pa.int32()),
]

# One row per (image, model).
PREDICTIONS = pa.schema(
    [
        *IDENTITY,
        *STATE,
        ("semantic", SEMANTIC),
        ("segments", SEGMENTS),
        ("depth", DEPTH),
        ("quality", QUALITY),
        ("run_id", pa.string()),
        ("labeled_at", pa.timestamp("us", tz="UTC")),
        ("fields", FIELDS),
        ("score", SCORE),
    ]
)

# One row per (target image, model), and one per prediction that has no target. `model_version` is the prediction's and
# the scoring options', joined by a dot. prediction: what was scored: an image_id of the prediction table, a path, a
# COCO image id.
SCORES = pa.schema(
    [
        *IDENTITY,
        *STATE,
        ("prediction", pa.string()),
        ("run_id", pa.string()),
        ("scored_at", pa.timestamp("us", tz="UTC")),
        ("fields", FIELDS),
        ("score", SCORE),
    ]
)

# Columns that older tables lack; they are added when such a table is written to, and read as nulls.
LATER = ("fields", "score")
