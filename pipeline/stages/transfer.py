"""A window of decoded samples as one Arrow cell, for the layout that decodes on other nodes than it predicts on."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import errors
from pipeline.errors import RowError
from pipeline.models.spec import Frame, Preprocess, Prompts
from pipeline.sources.base import UnitEnd
from pipeline.stages.decode import Decoded
from pipeline.stages.prepare import Prepared
from pipeline.stages.stream import Members

__all__ = ["pack_windows", "unpack_window"]

ROWS = pa.schema(
    [
        ("image_id", pa.string()),
        ("shard_id", pa.string()),
        ("position", pa.int64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
        ("error_stage", pa.string()),
        ("seconds", pa.list_(pa.float64())),
        ("bytes_read", pa.int64()),
        ("faults", pa.list_(pa.string())),
        ("prepared", pa.list_(pa.large_binary())),
        ("superpixels", pa.list_(pa.list_(pa.large_binary()))),
        ("sizes", pa.list_(pa.list_(pa.int64()))),
        ("prompts", pa.list_(pa.string())),
        ("targets", pa.map_(pa.string(), pa.large_binary())),
        ("fields", pa.map_(pa.string(), pa.string())),
    ]
)


def pack_windows(stream: Iterable[Decoded | UnitEnd], rows_per_window: int) -> Iterator[tuple[bytes, int | None]]:
    """Pack a decoded unit into (Arrow IPC bytes, None) per window of positions, then (b"", rows of the unit)."""
    members = Members(stream)
    for _, window in groupby(members, lambda decoded: decoded.position // rows_per_window):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, ROWS) as writer:
            for decoded in window:
                writer.write_batch(pa.RecordBatch.from_pylist([_row(decoded)], schema=ROWS))
        yield sink.getvalue().to_pybytes(), None
    yield b"", members.rows


def _row(decoded: Decoded) -> dict[str, Any]:
    return {
        "image_id": decoded.image_id,
        "shard_id": decoded.shard_id,
        "position": decoded.position,
        "width": decoded.width,
        "height": decoded.height,
        "error_type": type(decoded.error).__name__ if decoded.error else None,
        "error_message": str(decoded.error) if decoded.error else None,
        "error_stage": decoded.error_stage,
        "seconds": [decoded.read_s, decoded.decode_s, decoded.prepare_s],
        "bytes_read": decoded.bytes_read,
        "faults": list(decoded.faults),
        "prepared": [item and item.image_CHW.contiguous().numpy().tobytes() for item in decoded.prepared],
        "superpixels": [item and [_packed(values_HW) for values_HW in item.superpixels] for item in decoded.prepared],
        "sizes": [item and [item.frame.prepared_height, item.frame.prepared_width] for item in decoded.prepared],
        "prompts": [item and _to_text(item.frame.prompts) for item in decoded.prepared],
        "targets": list(decoded.targets.items()),
        "fields": list(decoded.fields.items()),
    }


def _packed(superpixel_HW: Tensor) -> bytes:
    """In two bytes a pixel where the numbers allow it, as they nearly always do, else in four."""
    values_HW = superpixel_HW.numpy()
    kind = np.uint16 if values_HW.max(initial=0) <= np.iinfo(np.uint16).max else np.int32
    return values_HW.astype(kind).tobytes()


def _unpacked(data: bytes, height: int, width: int) -> Tensor:
    kind = np.uint16 if len(data) == 2 * height * width else np.int32
    return torch.from_numpy(np.frombuffer(data, kind).reshape(height, width).astype(np.int32))


def _to_text(prompts: Prompts | None) -> str | None:
    return None if prompts is None else json.dumps([prompts.boxes, prompts.points, prompts.text])


def _to_prompts(text: str | None) -> Prompts | None:
    if text is None:
        return None
    boxes, points, words = json.loads(text)
    return Prompts(tuple(map(tuple, boxes)), tuple(map(tuple, points)), words)


def unpack_window(data: bytes, preprocesses: tuple[Preprocess, ...]) -> Iterator[Decoded]:
    """The inverse of one packed window."""
    with pa.ipc.open_stream(data) as reader:
        for batch in reader:
            for row in batch.to_pylist():
                yield _decoded(row, preprocesses)


def _decoded(row: dict[str, Any], preprocesses: tuple[Preprocess, ...]) -> Decoded:
    error: RowError | None = None
    if row["error_type"]:
        error = getattr(errors, row["error_type"])(row["error_message"])
    prepared: list[Prepared | None] = []
    columns = (row["prepared"], row["sizes"], row["prompts"], row["superpixels"])
    for pixels, size, text, maps, preprocess in zip(*columns, preprocesses, strict=False):
        if pixels is None:
            prepared.append(None)
            continue
        image_CHW = torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(3, *size).copy())
        frame = Frame(row["height"], row["width"], size[0], size[1], _to_prompts(text))
        superpixels = tuple(_unpacked(data, *size) for data in maps)
        prepared.append(Prepared(image_CHW, frame, preprocess.padded(*size), superpixels))
    read_s, decode_s, prepare_s = row["seconds"]
    return Decoded(
        image_id=row["image_id"],
        shard_id=row["shard_id"],
        position=row["position"],
        width=row["width"],
        height=row["height"],
        prepared=tuple(prepared),
        error=error,
        error_stage=row["error_stage"],
        read_s=read_s,
        decode_s=decode_s,
        prepare_s=prepare_s,
        bytes_read=row["bytes_read"],
        faults=tuple(row["faults"]),
        targets=dict(row["targets"]),
        fields=dict(row["fields"]),
    )
