"""A tar archive as a forward stream of members that says where and why it stopped, and never trusts a declared size.

`tarfile` ends silently at a broken header, reads extended headers of any declared size into memory, and stops after the
first part of a gzip file made of several; each of these would lose samples without a word.
"""

import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage import storage_errors

__all__ = ["Member", "TarCutError", "TarStream"]

BLOCK = 512
ZEROS = bytes(BLOCK)
CHUNK = 1 << 20
READ_AT_MOST = 8 << 20
SEEK_FROM = 4 << 20
MAX_EXTENDED_HEADER = 1 << 20
# What carries names for the next member (GNU long names, pax records), and pax records for all that follow.
GNU_NAME, GNU_LINK, PAX, PAX_GLOBAL = b"L", b"K", (b"x", b"X"), b"g"
PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")


class TarCutError(Exception):
    """The archive cannot be read from here on: it is cut, or its bytes are no tar."""


@dataclass(frozen=True, slots=True)
class Member:
    """One member. kind: `file`, `link` (hard or symbolic), or `other` (folder, device, sparse file)."""

    name: str
    size_bytes: int
    kind: str


class _Raw:
    """The stored object, forward only. Raises StorageError for faults and where it is shorter than listed."""

    def __init__(self, file: Any, where: str, size_bytes: int) -> None:
        self._file, self._where, self._size_bytes = file, where, size_bytes
        self._position = 0
        self._seekable = True

    def read(self, size: int) -> bytes:
        with storage_errors(self._where):
            data = bytes(self._file.read(size))
        self._position += len(data)
        if not data and size and self._position < self._size_bytes:
            raise StorageError(f"{self._where} ended after {self._position} of {self._size_bytes} bytes")
        return data

    def skip(self, size: int) -> int:
        """Pass over up to `size` bytes; returns how many there were."""
        left = size
        if left > SEEK_FROM and self._seekable and self._position + left <= self._size_bytes:
            try:
                with storage_errors(self._where):
                    self._file.seek(self._position + left - 1)
                self._position += left - 1
                left = 1  # read, so that an object that is shorter than listed shows
            except ValueError:  # an HTTP server without ranges
                self._seekable = False
        while left:
            data = self.read(min(left, CHUNK))
            if not data:
                break
            left -= len(data)
        return size - left


class _Gzip:
    """The unpacked bytes of a gzip file of one or several parts, with bounded memory. Raises TarCutError."""

    def __init__(self, read: Callable[[int], bytes], head: bytes) -> None:
        self._read = read
        self._packed = head
        self._unpacker = zlib.decompressobj(wbits=31)
        self._buffer = b""

    def read(self, size: int) -> bytes:
        while not self._buffer:
            if self._unpacker.eof:
                self._packed = self._unpacker.unused_data or self._packed
                self._packed = (self._packed or self._read(CHUNK)).lstrip(b"\0")  # padding between or after parts
                while not self._packed:
                    more = self._read(CHUNK)
                    if not more:
                        return b""
                    self._packed = more.lstrip(b"\0")
                self._unpacker = zlib.decompressobj(wbits=31)
            elif not self._packed:
                self._packed = self._read(CHUNK)
            last = not self._packed
            try:
                self._buffer = self._unpacker.decompress(self._packed, CHUNK)
            except zlib.error as error:
                raise TarCutError(f"the gzip stream is broken: {error}") from error
            if last and not self._buffer and not self._unpacker.eof:
                raise TarCutError("the gzip stream is cut")
            self._packed = self._unpacker.unconsumed_tail
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def skip(self, size: int) -> int:
        left = size
        while left:
            data = self.read(min(left, CHUNK))
            if not data:
                break
            left -= len(data)
        return size - left


class _Joined:
    """The bytes that were read to look at, then the rest."""

    def __init__(self, head: bytes, raw: _Raw) -> None:
        self._head, self._raw = head, raw

    def read(self, size: int) -> bytes:
        if not self._head:
            return self._raw.read(size)
        data, self._head = self._head[:size], self._head[size:]
        return data

    def skip(self, size: int) -> int:
        passed = len(self.read(min(size, len(self._head)))) if self._head else 0
        return passed + self._raw.skip(size - passed)


class TarStream:
    """Members one after the other: `next`, then `body` or `skip`, until `next` gives None.

    file: a binary stream; plain or gzip is told by its first bytes. size_bytes: what the listing said, 0 if unknown.
    An archive that ends after a whole member without the end mark is taken as complete; archives that were
    concatenated are read through. Raises TarCutError where the bytes end early or are no tar, StorageError for faults.
    """

    def __init__(self, file: Any, where: str, size_bytes: int = 0) -> None:
        raw = _Raw(file, where, size_bytes)
        head = b""
        while len(head) < 2:
            more = raw.read(2 - len(head))
            if not more:
                raise TarCutError("the file is empty" if not head else "the file has one byte")
            head += more
        self._source: _Gzip | _Joined = _Gzip(raw.read, head) if head == b"\x1f\x8b" else _Joined(head, raw)
        self._left = 0
        self._padding = 0
        self._defaults: dict[str, str] = {}
        self._ended = False

    def next(self) -> Member | None:
        """The next member, or None at the end."""
        self.skip()
        name: str | None = None
        records = dict(self._defaults)
        pending = False
        while True:
            header = self._header(pending)
            if header is None:
                return None
            pending = True
            if header.type in (GNU_NAME, GNU_LINK):
                text = self._extended(header.size)
                if header.type == GNU_NAME:
                    name = _text(text.partition(b"\0")[0])
            elif header.type in PAX:
                records |= _pax(self._extended(header.size))
            elif header.type == PAX_GLOBAL:
                self._defaults |= _pax(self._extended(header.size))
                records |= self._defaults
                pending = False
            else:
                break
        return self._member(header, records.get("path") or name or header.name, records)

    def _member(self, header: tarfile.TarInfo, name: str, records: dict[str, str]) -> Member:
        sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in records)
        size = header.size
        if "size" in records:
            if not records["size"].isdecimal() or len(records["size"]) > 20:
                raise TarCutError(f"a pax header gives the size {records['size'][:40]!r}")
            size = int(records["size"])
        # Links, folders and devices have no body, whatever size they claim (tarfile reads them the same way).
        self._left = size if header.isreg() or sparse or header.type not in tarfile.SUPPORTED_TYPES else 0
        self._padding = -self._left % BLOCK
        kind = "link" if header.islnk() or header.issym() else "file" if header.isreg() and not sparse else "other"
        return Member(name, self._left, kind)

    def body(self) -> bytes:
        """The current member's bytes; its declared size must have been checked."""
        parts = []
        while self._left:
            data = self._source.read(min(self._left, READ_AT_MOST))
            if not data:
                raise TarCutError(f"the archive is cut, {self._left} bytes of a member are missing")
            self._left -= len(data)
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self) -> None:
        """Pass over what is left of the current member, without its padding."""
        if self._left:
            self._left -= self._source.skip(self._left)
            if self._left:
                raise TarCutError(f"the archive is cut, {self._left} bytes of a member are missing")

    def _exactly(self, size: int) -> bytes:
        data = self._source.read(size)
        while 0 < len(data) < size:
            more = self._source.read(size - len(data))
            if not more:
                break
            data += more
        return data

    def _header(self, pending: bool) -> tarfile.TarInfo | None:
        if self._padding:
            if len(self._exactly(self._padding)) < self._padding:
                raise TarCutError("the archive is cut in the padding of a member")
            self._padding = 0
        while True:
            block = self._exactly(BLOCK)
            if block == ZEROS[: len(block)]:
                if pending:
                    raise TarCutError("the archive is cut after an extended header")
                if len(block) < BLOCK:
                    return None
                self._ended = True
                continue
            if len(block) < BLOCK:
                raise TarCutError("the archive is cut inside a header")
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
            except (tarfile.HeaderError, ValueError) as error:
                what = "bytes after its end mark" if self._ended else "bytes"
                raise TarCutError(f"{what} that are no tar header ({error})") from error
            self._ended = False
            if header.size < 0:
                raise TarCutError("a header declares a negative size")
            extended = header.type == tarfile.GNUTYPE_SPARSE and block[482] != 0
            while extended:
                block = self._exactly(BLOCK)
                if len(block) < BLOCK:
                    raise TarCutError("the archive is cut inside a header")
                extended = block[504] != 0
            return header

    def _extended(self, size: int) -> bytes:
        if size > MAX_EXTENDED_HEADER:
            raise TarCutError(f"an extended header declares {size} bytes, at most {MAX_EXTENDED_HEADER} are read")
        whole = size + (-size % BLOCK)
        data = self._exactly(whole)
        if len(data) < whole:
            raise TarCutError("the archive is cut inside an extended header")
        return data[:size]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _pax(data: bytes) -> dict[str, str]:
    """The records of a pax header, `length key=value\\n` each. Raises TarCutError where they are malformed."""
    records = {}
    position = 0
    while position < len(data) and data[position] != 0:
        match = PAX_RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or end <= match.end() or end > len(data):
            raise TarCutError("a pax header is malformed")
        records[_text(match[2])] = _text(data[match.end() : end - 1])
        position = end
    return records
