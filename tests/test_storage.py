"""Addresses: patterns, listings on every kind of storage, what is opened, and which faults are whose."""

import asyncio
import errno
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from pipeline import storage
from pipeline.errors import ConfigError, StorageError


def listed(uri: Any, suffixes: tuple[str, ...] = (".tar",), **options: Any) -> list[str]:
    _, root, entries = storage.list_entries(str(uri), options, suffixes=suffixes)
    return [storage.relative(root, entry.path) for entry in entries]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "train/0.tar",
        "train/1.tar",
        "val/0.tar",
        "val/deep/2.TAR",
        "val/notes.txt",
        ".cache/x.tar",
        "val/._0.tar",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["train/0.tar", "train/1.tar", "val/0.tar", "val/deep/2.TAR"]),
        ("/", ["train/0.tar", "train/1.tar", "val/0.tar", "val/deep/2.TAR"]),
        ("/train", ["0.tar", "1.tar"]),
        ("/train/1.tar", ["1.tar"]),
        ("/val/notes.txt", ["notes.txt"]),
        ("/*/0.tar", ["train/0.tar", "val/0.tar"]),
        ("/val/**", ["._0.tar", "0.tar", "deep/2.TAR"]),
        ("/val/[0-1].t?r", ["0.tar"]),
        ("/{train,val}/0.tar", ["train/0.tar", "val/0.tar"]),
        ("/{val,train}", ["train/0.tar", "train/1.tar", "val/0.tar", "val/deep/2.TAR"]),
        ("/train/{0..1}.tar", ["0.tar", "1.tar"]),
        ("/train/{1,0,0}.tar", ["0.tar", "1.tar"]),
        ("/{train/{0..1},val/0}.tar", ["train/0.tar", "train/1.tar", "val/0.tar"]),
        ("/{train,val/d*}/*", ["train/0.tar", "train/1.tar", "val/deep/2.TAR"]),
    ],
)
def test_patterns(tree: Path, pattern: str, expected: list[str]) -> None:
    assert listed(f"{tree}{pattern}") == expected
    assert listed(f"file://{tree}{pattern}") == expected


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("/none", StorageError, "does not exist"),
        ("/none/*.tar", StorageError, "does not exist"),
        ("/train/{0..2}.tar", StorageError, "does not exist"),
        ("/val/*.txt", ConfigError, "nothing matches"),
        ("/{train", ConfigError, "train"),
        ("/{0..9}{0..999}{0..999}.tar", ConfigError, "more than 2000000"),
    ],
)
def test_what_cannot_be_listed(tree: Path, pattern: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        listed(f"{tree}{pattern}")


def test_many_named_objects_are_listed_at_once(tmp_path: Path) -> None:
    for n in range(100):
        (tmp_path / f"{n:03d}.tar").touch()
    assert len(listed(f"{tmp_path}/{{000..099}}.tar")) == 100
    with pytest.raises(StorageError, match="does not exist"):
        listed(f"{tmp_path}/{{000..100}}.tar")


def test_unknown_protocols() -> None:
    for uri in ("nonsense://x/y", "s3x://a"):
        with pytest.raises(ConfigError):
            listed(uri)


def test_fingerprints_follow_the_content(tree: Path) -> None:
    def marks() -> list[str]:
        return [entry.fingerprint for entry in storage.list_entries(str(tree / "train"), suffixes=(".tar",))[2]]

    before = marks()
    assert before == marks()
    (tree / "train/1.tar").write_bytes(b"other")
    after = marks()
    assert before[0] == after[0]
    assert before[1] != after[1]


class CountingFileSystem(AbstractFileSystem):
    """`counting://`: 100,000 objects that must not be opened or asked for one by one."""

    protocol = "counting"
    cachable = False
    calls: ClassVar[dict[str, int]] = {}
    count = 100_000

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        self.calls["ls"] = self.calls.get("ls", 0) + 1
        found = [
            {"name": f"bucket/s-{n:06d}.tar", "size": n, "type": "file", "ETag": f"e{n}"} for n in range(self.count)
        ]
        return found if detail else [item["name"] for item in found]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        self.calls["info"] = self.calls.get("info", 0) + 1
        return {"name": path, "size": 0, "type": "directory"}

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self.calls["open"] = self.calls.get("open", 0) + 1
        raise OSError("opened")


fsspec.register_implementation("counting", CountingFileSystem, clobber=True)


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/s-{000000..099999}.tar"])
def test_listing_100_000_objects_opens_none(pattern: str) -> None:
    CountingFileSystem.calls.clear()
    started = time.perf_counter()
    _, root, entries = storage.list_entries(f"counting://bucket{pattern}", suffixes=(".tar",))
    assert len(entries) == 100_000
    assert (root, entries[7].path, entries[7].size_bytes) == ("bucket", "bucket/s-000007.tar", 7)
    assert "open" not in CountingFileSystem.calls
    assert sum(CountingFileSystem.calls.values()) < 10
    assert time.perf_counter() - started < 20


def test_memory_and_listings_are_fresh() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/storage-test/a/1.tar", b"1")
    assert listed("memory://storage-test") == ["a/1.tar"]
    memory.pipe("/storage-test/a/2.tar", b"2")
    assert listed("memory://storage-test") == ["a/1.tar", "a/2.tar"]


def test_s3(s3: Any) -> None:
    bucket = s3.bucket("storage")
    for key in ("t/0.tar", "t/1.tar", "v/0.tar", "v/é+ %20#?.tar", "v/", "v/x.txt"):
        s3.client.put_object(Bucket=bucket, Key=key, Body=key.encode())
    assert listed(f"s3://{bucket}", **s3.options) == ["t/0.tar", "t/1.tar", "v/0.tar", "v/é+ %20#?.tar"]
    assert listed(f"s3://{bucket}/v/", **s3.options) == ["0.tar", "é+ %20#?.tar"]
    assert listed(f"s3://{bucket}/*/0.tar", **s3.options) == ["t/0.tar", "v/0.tar"]
    assert listed(f"s3://{bucket}/t/{{0..1}}.tar", **s3.options) == ["0.tar", "1.tar"]
    s3.client.put_object(Bucket=bucket, Key="t/2.tar", Body=b"new")
    assert listed(f"s3://{bucket}/t", **s3.options) == ["0.tar", "1.tar", "2.tar"]
    assert storage.read_bytes(f"s3://{bucket}/t/0.tar", s3.options, max_bytes=7) == b"t/0.tar"
    for missing in (
        f"s3://{bucket}/none",
        f"s3://{bucket}/t/{{0..3}}.tar",
        "s3://no-such-bucket/x",
        "s3://no-such-bucket/*.tar",
    ):
        with pytest.raises(StorageError):
            listed(missing, **s3.options)
    wrong = {**s3.options, "endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}}
    with pytest.raises(StorageError):
        listed(f"s3://{bucket}/t", **wrong)


def test_read_bytes_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert storage.read_bytes(str(tmp_path / "x"), max_bytes=5) == b"12345"
    with pytest.raises(StorageError, match="larger than the 4 bytes"):
        storage.read_bytes(str(tmp_path / "x"), max_bytes=4)
    with pytest.raises(StorageError, match="does not exist"):
        storage.read_bytes(str(tmp_path / "y"), max_bytes=4)


class Botocore(Exception):  # noqa: N818
    __module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (FileNotFoundError("x"), StorageError),
        (PermissionError("x"), StorageError),
        (ConnectionResetError("x"), StorageError),
        (TimeoutError("x"), StorageError),
        (asyncio.IncompleteReadError(b"", 5), StorageError),
        (Botocore("x"), StorageError),
        (ImportError("x"), ConfigError),
        (ConfigError("x"), ConfigError),
        (ValueError("x"), ValueError),
    ],
)
def test_whose_fault_it_is(raised: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected), storage.storage_errors("where"):
        raise raised


def test_text_of_any_name() -> None:
    assert storage.relative("/a/b", "/a/b/c/d.jpg") == "c/d.jpg"
    assert storage.relative("", "/c.jpg") == "c.jpg"
    assert storage.clean("\udcff\ud800é") == r"\udcff\ud800é"
    with pytest.raises(ConfigError, match="not UTF-8"):
        storage.address(fsspec.filesystem("file"), "/a/\udcff.tar")


def test_delta_options() -> None:
    assert storage.delta_options({"key": "k", "secret": "s", "endpoint_url": "http://h:1", "anon": False}) == {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_ENDPOINT_URL": "http://h:1",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    assert storage.delta_options({"anon": True, "client_kwargs": {"region_name": "r"}}) == {
        "AWS_REGION": "r",
        "AWS_SKIP_SIGNATURE": "true",
    }


@pytest.mark.parametrize("known", [True, False])
def test_a_file_that_is_not_written_leaves_the_one_before(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, path = storage.open_fs(str(tmp_path / "run.json"))
    if known:
        storage.write_file(fs, path, b"before", "there")

    def full(path: str, data: bytes) -> None:
        Path(path).write_bytes(data[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fs, "pipe_file", full)
        with pytest.raises(StorageError, match=r"there: OSError: .*No space left"):
            storage.write_file(fs, path, b"after", "there")
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == ({"run.json": b"before"} if known else {})
    storage.write_file(fs, path, b"after", "there")
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == {"run.json": b"after"}
