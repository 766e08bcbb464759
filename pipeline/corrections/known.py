"""Whose image a file of corrections means: by names of the export that went out, and ids of the table before it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline.errors import TargetMismatchError
from pipeline.export.names import IMAGE_SUFFIX
from pipeline.storage import join, open_fs, storage_errors

__all__ = ["Known", "Names", "read_names"]

MARKS = re.compile(r"_leftImg8bit$")


@dataclass(frozen=True, slots=True)
class Known:
    """One image. shard_id, position: its place in the source, empty and -1 without an export; width, height: 0 then."""

    image_id: str
    shard_id: str = ""
    position: int = -1
    width: int = 0
    height: int = 0


class Names:
    """Images by what a tool may call them. Without an export, the name of a file is the image's id."""

    def __init__(self, rows: list[Known], names: Mapping[str, int]) -> None:
        self._rows, self._names = rows, names
        self._by_id = {row.image_id: row for row in rows}

    def find(self, file_name: str, image_id: str | None) -> Known:
        """Raises TargetMismatchError for an image that the export does not have."""
        if not self._rows:
            return Known(image_id or file_name)
        if image_id is not None and image_id in self._by_id:
            return self._by_id[image_id]
        if file_name in self._by_id:
            return self._by_id[file_name]
        base = file_name.rpartition("/")[2]
        stem = MARKS.sub("", IMAGE_SUFFIX.sub("", base))
        for name in (file_name, base, stem, file_name.removeprefix("images/")):
            if name in self._names:
                return self._rows[self._names[name]]
        raise TargetMismatchError(f"the export has no image {file_name[:200]!r}")


def read_names(uri: str | None, storage: Mapping[str, Any]) -> Names:
    """names.parquet of an export, about 500 bytes an image in memory. Raises StorageError."""
    rows: list[Known] = []
    names: dict[str, int] = {}
    if uri is not None:
        fs, base = open_fs(uri, storage)
        where = join(uri, "names.parquet")
        with storage_errors(where), fs.open(join(base, "names.parquet"), "rb") as data:
            for batch in pq.ParquetFile(data).iter_batches(4096, use_threads=False):
                for row in batch.to_pylist():
                    for name in (row["file_name"], row["name"]):
                        names.setdefault(name, len(rows))
                    place = row["shard_id"], row["position"]
                    rows.append(Known(row["image_id"], *place, row["width"], row["height"]))
    return Names(rows, names)
