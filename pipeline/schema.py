"""Column names, Arrow schemas and the axis legend.

Axes in names: B batch, C channels, H rows, W columns, K classes, N segments. `image_HWC` is uint8 RGB, `logits_BKHW`
float, `label_HW` uint8 or uint16 ids of a taxonomy, `depth_HW` float32.
"""

import pyarrow as pa

__all__ = [
    "DEPTH",
    "FAILED",
    "FIELDS",
    "MODEL",
    "OK",
    "QUALITY",
    "SEGMENTS",
    "SEMANTIC",
    "UNITS",
]

MODEL = "model"
OK = "ok"
FAILED = "failed"

# What the source knows of an image beside its pixels (city, camera, split), for slicing reports.
FIELDS = pa.map_(pa.string(), pa.string())

SEMANTIC = pa.struct([("format", pa.string()), ("data", pa.binary())])
RLE = pa.string()
BBOX = pa.list_(pa.float32())
SEGMENTS = pa.list_(
    pa.struct(
        [
            ("id", pa.int32()),
            ("category_id", pa.int32()),
            ("score", pa.float32()),
            ("area", pa.int64()),
            ("bbox", BBOX),
            ("rle", RLE),
        ]
    )
)
DEPTH = pa.struct(
    [
        ("format", pa.string()),
        ("data", pa.binary()),
        ("scale", pa.float64()),
        ("offset", pa.float64()),
        ("kind", pa.string()),
    ]
)
QUALITY = pa.struct(
    [
        ("mean_max_probability", pa.float32()),
        ("mean_entropy", pa.float32()),
        ("low_confidence_share", pa.float32()),
    ]
)

# What is known of each unit, as a log: the last line of a (shard_id, model_version) counts. `model_version` is empty on
# lines of the plan; on others `rows` is set where the unit is finished and null where it was opened again.
UNITS = pa.schema(
    [
        ("order", pa.int64()),
        ("shard_id", pa.string()),
        ("model_version", pa.string()),
        ("fingerprint", pa.string()),
        ("size_bytes", pa.int64()),
        ("rows", pa.int64()),
        ("stop", pa.int64()),
        ("run_id", pa.string()),
    ]
)
