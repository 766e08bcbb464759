"""File systems for tests: one that fails on purpose, one that counts what is opened. Both keep files in memory."""

import io
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem


class FlakyFile(io.BytesIO):
    def __init__(self, data: bytes, fs: "FlakyFileSystem") -> None:
        super().__init__(data)
        self.fs = fs

    def read(self, size: int | None = -1) -> bytes:
        start = self.tell()
        end = start + (size if size is not None and size >= 0 else 1 << 62)
        for fault in FlakyFileSystem.faults:
            if start <= fault < end:
                FlakyFileSystem.faults.remove(fault)
                FlakyFileSystem.raised += 1
                raise OSError(f"connection reset at byte {fault}")
        if any(start <= fault < end for fault in FlakyFileSystem.lasting):
            FlakyFileSystem.raised += 1
            raise OSError("connection reset, as always")
        return super().read(size)


class FlakyFileSystem(AbstractFileSystem):
    """`flaky://`: reads that pass over a byte of `faults` fail once, over one of `lasting` always."""

    protocol = "flaky"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    faults: ClassVar[list[int]] = []
    lasting: ClassVar[list[int]] = []
    opened: ClassVar[list[str]] = []
    raised = 0

    @classmethod
    def reset(cls, files: dict[str, bytes] | None = None) -> None:
        cls.files, cls.faults, cls.lasting, cls.opened, cls.raised = files or {}, [], [], [], 0

    def _entry(self, path: str) -> dict[str, Any]:
        return {"name": path, "size": len(self.files[path]), "type": "file", "mtime": 1.0}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        folder = path.rstrip("/") + "/"
        names: dict[str, dict[str, Any]] = {}
        for name in self.files:
            if name == path:
                names[name] = self._entry(name)
            elif name.startswith(folder):
                child = folder + name[len(folder) :].split("/")[0]
                directory = {"name": child, "size": 0, "type": "directory"}
                names[child] = self._entry(name) if child == name else directory
        if not names:
            raise FileNotFoundError(path)
        return list(names.values()) if detail else list(names)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path in self.files:
            return self._entry(path)
        if any(name.startswith(path + "/") for name in self.files):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> FlakyFile:
        self.opened.append(path)
        if path not in self.files:
            raise FileNotFoundError(path)
        return FlakyFile(self.files[path], self)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
