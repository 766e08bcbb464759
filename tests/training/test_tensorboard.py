"""TensorBoard's file, read by a parser of its own: framing and checksums as the format has them."""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from tensorboardX.proto.event_pb2 import Event
from training_helpers import config, run_loop

from pipeline.training.history import Row
from pipeline.training.tensorboard import EVENT_FILE, event_file

ROWS: list[Row] = [
    {
        "epoch": 1,
        "step": 10,
        "loss": 2.5,
        "learning_rate": 1e-3,
        "images": 80,
        "failed": 0,
        "seconds": 20.0,
        "images_per_s": 4.0,
        "mIoU": 0.1,
        "IoU/road": 0.7,
        "IoU/car": None,
        "validation_images": 7,
        "validation_failed": 0,
        "ended_at": 1_700_000_020.25,
    },
    {"epoch": 2, "step": 20, "loss": 1.5, "learning_rate": 5e-4, "images_per_s": 4.5, "ended_at": 1_700_000_040.5},
    {"epoch": 3, "step": 30, "loss": 1.25, "mIoU": 0.25, "ended_at": 1_700_000_061.0},
]


def crc32c(data: bytes) -> int:
    """Bit by bit (RFC 3720, B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(data: bytes) -> list[Event]:
    """Every record of a file that ends where its last one does."""
    found = []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        head, body, tail = data[8:12], data[12 : 12 + size], data[12 + size : 16 + size]
        assert struct.unpack("<I", head) == (masked(struct.pack("<Q", size)),)
        assert struct.unpack("<I", tail) == (masked(body),)
        found.append(Event.FromString(body))
        data = data[16 + size :]
    return found


def scalars(event: Event) -> dict[str, float]:
    return {value.tag: value.simple_value for value in event.summary.value}


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_events_hold_the_rows() -> None:
    version, *found = events(event_file(ROWS))
    assert version.file_version == "brain.Event:2"
    assert version.wall_time == 1_700_000_000.25  # when the first epoch began
    assert [event.step for event in found] == [10, 20, 30]
    assert [event.wall_time for event in found] == [1_700_000_020.25, 1_700_000_040.5, 1_700_000_061.0]
    assert scalars(found[0]) == {
        "epoch": 1.0,
        "loss": 2.5,
        "learning_rate": np.float32(1e-3),
        "images_per_s": 4.0,
        "validation/mIoU": np.float32(0.1),
        "validation/IoU/road": np.float32(0.7),
        "validation/images": 7.0,
        "validation/failed": 0.0,
    }
    assert [*scalars(found[1])] == ["epoch", "loss", "learning_rate", "images_per_s"]
    assert scalars(found[2]) == {"epoch": 3.0, "loss": 1.25, "validation/mIoU": 0.25}


def test_a_longer_history_begins_with_the_shorter_one() -> None:
    """So a reader that stands in the middle of the file goes on."""
    whole = event_file(ROWS)
    for size in range(1, len(ROWS)):
        assert whole.startswith(event_file(ROWS[:size]))
    assert event_file(ROWS) == whole
    assert len(events(event_file([]))) == 1


def test_rows_without_a_time_are_written(tmp_path: Path) -> None:
    """Of checkpoints from before there was one."""
    (_, event) = events(event_file([{"epoch": 1, "step": 5, "loss": 0.5}]))
    assert (event.wall_time, scalars(event)) == (0.0, {"epoch": 1.0, "loss": 0.5})


def test_a_run_writes_its_history(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run_loop(config(tmp_path / "a", output={"uri": str(tmp_path / "a"), "tensorboard": True}))
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    _, *found = events((tmp_path / "a" / EVENT_FILE).read_bytes())
    assert len(found) == len(lines) == 2
    for event, line in zip(found, lines, strict=True):
        values = scalars(event)
        assert (event.step, event.wall_time) == (line["step"], line["ended_at"])
        assert values["loss"] == np.float32(line["loss"])
        assert values["validation/mIoU"] == np.float32(line["mIoU"])
        assert values["validation/images"] == 7
    run_loop(config(tmp_path / "b", epochs=1))
    assert not (tmp_path / "b" / "tensorboard").exists()
