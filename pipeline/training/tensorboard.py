"""The history as TensorBoard's event file: whole, in memory, so that it can be written to any storage.

The same rows give the same bytes, and a longer history begins with the bytes of a shorter one: a TensorBoard that has
read half of the file goes on where it was when the file is written again.
"""

import struct
from collections.abc import Iterator, Sequence

from pipeline.training.history import RUN_COLUMNS, Row

__all__ = ["EVENT_FILE", "event_file"]

EVENT_FILE = "tensorboard/events.out.tfevents.maskmill"
FILE_VERSION = "brain.Event:2"
RUN_TAGS = ("epoch", "loss", "learning_rate", "images_per_s")
VALIDATION = "validation"


def event_file(rows: Sequence[Row]) -> bytes:
    """One event for each row, at its optimiser step and the time at which its epoch ended.

    Scalars are float32: `loss`, `learning_rate`, `images_per_s`, `epoch`, and the validation's as `validation/mIoU`;
    a figure without evidence has no point.
    """
    # Not for runs that do not ask for it: it takes a while to load.
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    begin = (rows[0].get("ended_at") or 0.0) - (rows[0].get("seconds") or 0.0) if rows else 0.0
    events = [Event(wall_time=begin, file_version=FILE_VERSION)]
    for row in rows:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(row)]
        events.append(Event(wall_time=row.get("ended_at") or 0.0, step=row["step"], summary=Summary(value=values)))
    return b"".join(_record(event.SerializeToString(deterministic=True)) for event in events)


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if value is not None and name in RUN_TAGS:
            yield name, value
        elif value is not None and name not in RUN_COLUMNS:
            yield f"{VALIDATION}/{name.removeprefix(f'{VALIDATION}_')}", value


def _record(data: bytes) -> bytes:
    """A TFRecord: length, its checksum, data, its checksum, all little-endian."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
