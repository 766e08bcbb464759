"""Small helpers of the source tests."""

import contextlib
import functools
import http.server
import io
import tarfile
import threading
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.sources.base import Sample, Source, Unit, UnitEnd, read_unit


def tar_bytes(members: Sequence[tuple[str, bytes] | tarfile.TarInfo], mode: str = "w", **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def read(
    source: Source, unit: Unit, done: Container[int] = frozenset(), *, images: bool = True
) -> tuple[list[Sample], UnitEnd]:
    """The samples and the end of one unit, with the order checked."""
    *samples, end = read_unit(source, unit, done, images=images)
    assert isinstance(end, UnitEnd)
    assert all(isinstance(sample, Sample) for sample in samples)
    positions = [sample.position for sample in samples]  # type: ignore[union-attr]
    assert positions == sorted(set(positions))
    assert all(position < end.rows for position in positions)
    return samples, end  # type: ignore[return-value]


def read_all(source: Source, *, images: bool = True) -> list[Sample]:
    return [sample for unit in source.plan(images=images) for sample in read(source, unit, images=images)[0]]


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, with or without byte ranges."""

    ranges = False
    log: list[str]

    def send_head(self) -> Any:
        asked = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        self.log.append(f"{self.command} {self.path} {asked or ''}".strip())
        if not (self.ranges and asked and path.is_file()):
            return super().send_head()
        first, _, last = asked.removeprefix("bytes=").partition("-")
        size = path.stat().st_size
        start, end = int(first), min(int(last or size - 1), size - 1)
        if start > end:
            self.send_error(416)
            return None
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        return io.BytesIO(path.read_bytes()[start : end + 1])

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        super().end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def http_server(folder: Path, *, ranges: bool) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder on this machine; gives the address and the log of requests."""
    log: list[str] = []
    handler = type("Handler", (_Handler,), {"ranges": ranges, "log": log})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
