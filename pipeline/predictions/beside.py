"""What predictions that other tools wrote have in common: where they are opened, and how units get their own."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping

import fsspec
import pyarrow as pa

from pipeline.config import PredictionsConfig, SourceConfig
from pipeline.errors import PredictError, RowError, TargetMismatchError
from pipeline.predictions.base import Found, join_payload
from pipeline.sources.coco import image_ids
from pipeline.sources.objects import fingerprint, open_beside
from pipeline.storage import open_fs

__all__ = ["by_image", "extend_plan", "failed", "open_predictions_uri"]


def open_predictions_uri(
    config: PredictionsConfig, source: SourceConfig, uri: str
) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open `uri` with predictions.storage, else with the source's options where it is on the same kind of storage."""
    if config.storage or source.uri is None:
        return open_fs(uri, config.storage)
    return open_beside(uri, source.uri, source.storage)


def extend_plan(plan: pa.Table, parts: Iterable[tuple[str, bytes]]) -> pa.Table:
    """A source's plan as that of an evaluation: each unit's fingerprint with a mark, its payload with predictions."""
    marks, payloads = zip(*parts, strict=True) if len(plan) else ((), ())
    columns = {
        "fingerprint": [
            f"{own} {mark}" for own, mark in zip(plan.column("fingerprint").to_pylist(), marks, strict=True)
        ],
        "payload": [
            join_payload(own or b"", more)
            for own, more in zip(plan.column("payload").to_pylist(), payloads, strict=True)
        ],
    }
    for name, values in columns.items():
        at = plan.column_names.index(name)
        plan = plan.set_column(at, plan.field(at), pa.array(values, plan.field(at).type))
    return plan


def by_image(
    plan: pa.Table, texts: Mapping[str, bytes | bytearray], *, marks: Mapping[str, str] | None = None, common: str = ""
) -> tuple[pa.Table, pa.Array]:
    """The plan of a COCO source with each unit's own of `texts`, JSON by image id; and the ids that no unit has.

    `objects.unpack` gives a unit's texts back as a dict of what they say. marks: what else changes with a prediction;
    common: with all of them.
    """
    parts: list[tuple[str, bytes]] = []
    strangers = set(texts)
    for payload in plan.column("payload"):
        own = [number for number in image_ids(payload.as_py()) if number in texts]
        strangers.difference_update(own)
        text = bytearray(b"{")
        for number in own:
            text += (b", " if len(text) > 1 else b"") + json.dumps(number).encode() + b": "
            text += texts[number]
        text += b"}"
        mark = fingerprint([common, *((marks or {}).get(number, "") for number in own)])
        parts.append((f"{hashlib.blake2b(text, digest_size=8).hexdigest()} {mark}", zlib.compress(text)))
    return extend_plan(plan, parts), pa.array(sorted(strangers), pa.string())


def failed(name: str, error: RowError, stage: str) -> Found:
    """A prediction that is there and of no use. What a decoder of targets says is said of the prediction instead."""
    if isinstance(error, TargetMismatchError):
        error = PredictError(str(error))
    return Found(name=name, error=error, error_stage=stage)
