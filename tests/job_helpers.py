"""What the tests of jobs share: running a job in this process, reading its table, and bytes that go wrong."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from deltalake import DeltaTable
from PIL import Image

from jobs import evaluate, label
from pipeline.sources.scenes import render_scene


def run_label(*arguments: str) -> int:
    """`maskmill label` in this process; the exit code."""
    return label.main(list(arguments))


def run_evaluate(*arguments: str) -> int:
    """`maskmill evaluate` in this process; the exit code."""
    return evaluate.main(list(arguments))


def rows_of(output: Path | str, columns: list[str] | None = None, **options: Any) -> list[dict[str, Any]]:
    """All committed rows, by model and image."""
    table = DeltaTable(str(output), **options).to_pyarrow_table(columns=columns)
    return sorted(table.to_pylist(), key=lambda row: (row.get("model", ""), row["image_id"]))


def run_json(output: Path) -> dict[str, Any]:
    """The newest run's provenance."""
    result: dict[str, Any] = json.loads((output / "run.json").read_text())
    return result


def jpeg(index: int, width: int = 96, height: int = 64) -> bytes:
    """A small scene as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(render_scene(index, width=width, height=height).image_HWC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def png(image_HWC: np.ndarray[Any, Any]) -> bytes:
    """Any array as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    """A few bytes that claim to be a huge PNG."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tar_bytes(members: dict[str, bytes]) -> bytes:
    """A tar with these members, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
