"""Names of files from image ids: safe on every file system, unique in the export, readable where the id is."""

import hashlib
import re
from collections.abc import Iterable

import numpy as np

__all__ = ["Namer", "Shared", "is_plain_path"]

LONGEST = 100
IMAGE_SUFFIX = re.compile(r"\.(jpe?g|png|webp|tiff?|bmp)$", re.IGNORECASE)
MARKED = re.compile(r"-[0-9a-f]{16}$")
# What Windows does not take as the name of a file, whatever follows it.
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)


class Namer:
    """Image ids to names without an extension. Two ids whose letters come out the same get a hash of the id each."""

    def __init__(self, shared: Iterable[int] = ()) -> None:
        """shared: hashes (`shared_by`) of what several ids of the export come out as."""
        self.shared = frozenset(shared)

    def name(self, image_id: str) -> str:
        """Letters, digits, underscore and hyphen alone: no dot, no separator, never empty."""
        plain = _plain(image_id)
        if len(plain) <= LONGEST and _hash(plain.lower()) not in self.shared and not MARKED.search(plain):
            return plain
        return f"{plain[:LONGEST]}-{hashlib.blake2b(image_id.encode('utf-8', 'replace'), digest_size=8).hexdigest()}"


class Shared:
    """Finds the names that several ids would have, at 8 bytes an id."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []

    def add(self, image_ids: Iterable[str]) -> None:
        self._hashes.append(np.array([_hash(_plain(image_id).lower()) for image_id in image_ids], np.uint64))

    def found(self) -> tuple[int, ...]:
        if not self._hashes:
            return ()
        hashes = np.sort(np.concatenate(self._hashes))
        return tuple(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]).tolist())


def is_plain_path(name: str) -> bool:
    """Whether an id can be shown to a reader as a relative path: it leads nowhere else and hides nothing."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and ":" not in name and not {"", ".", ".."} & set(parts)


def _plain(image_id: str) -> str:
    stem = IMAGE_SUFFIX.sub("", image_id)
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")
    return f"_{plain}" if not plain or DEVICES.fullmatch(plain) else plain


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
