"""The output is tried and left as it was: on a disk, a full disk, an S3 server, and one that refuses."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fault_proxy import Fault, FaultProxy
from s3_endpoint import S3

from pipeline.preflight import probe
from pipeline.preflight.probe import PREFIX, check_space, probe_output

FORBIDDEN = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("delta", [True, False])
def test_a_disk_is_left_as_it_was(tmp_path: Path, delta: bool) -> None:
    (tmp_path / "model=m").mkdir()
    (tmp_path / "model=m" / "part-1.parquet").write_bytes(b"rows")
    before = tree(tmp_path)
    found = probe_output(str(tmp_path), {}, delta=delta)
    assert (found.problems, tree(tmp_path)) == ([], before)
    assert probe_output(str(tmp_path / "new" / "folder"), {}, delta=delta).problems == []
    assert tree(tmp_path) == before


def test_what_cannot_be_a_folder_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    before = tree(tmp_path)
    found = probe_output(str(tmp_path / "file" / "out"), {}, delta=True)
    assert any(item.what.startswith("cannot write") for item in found.problems)
    assert all(item.where == "output.uri" and str(tmp_path) in item.what for item in found.problems)
    assert tree(tmp_path) == before


def test_a_storage_that_gives_back_something_else_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "write_file", lambda fs, path, data, where: fs.pipe_file(path, data[:5]))
    (problem,) = probe_output(str(tmp_path), {}, delta=False).problems
    assert "expected the 40 bytes written, got 5 others" in problem.what
    assert tree(tmp_path) == {}


FULL = """
mount -t tmpfs -o size=1m none "$out" || exit 97
head -c 2M /dev/zero > "$out/filler" 2> /dev/null
"$@"
ls -A "$out"
"""
TRY = """
import json, sys
from pipeline.preflight.probe import check_space, probe_output
found = probe_output(sys.argv[1], {}, delta=True)
space, free = check_space(sys.argv[1], {}, 1000.0)
print(json.dumps([[item.what for item in found.problems], [item.what for item in space.problems], free]))
"""


def test_a_full_disk_is_a_problem(tmp_path: Path) -> None:
    own_mounts = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    tried = subprocess.run(
        [*own_mounts, f"mount -t tmpfs none {tmp_path}"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        pytest.skip(f"no file system of its own for the test: {tried.stderr.strip()}")
    script = f'out="{tmp_path}"; {FULL}'
    command = [*own_mounts, script, "sh", sys.executable, "-c", TRY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed, *left = done.stdout.splitlines()
    problems, space, free = json.loads(printed)
    assert any("cannot write" in text and "No space left on device" in text for text in problems), problems
    assert len(space) == 1
    assert space[0].startswith("expected room for 1e-06 GB")
    assert free == 0
    assert left == ["filler"]


def test_room_is_asked_of_disks_and_unknown_of_object_stores(tmp_path: Path, s3: S3) -> None:
    enough, free = check_space(str(tmp_path / "not" / "yet"), {}, 1e3)
    assert not enough.problems
    assert free is not None
    short, _ = check_space(str(tmp_path), {}, float(free) * 10)
    assert [item.where for item in short.problems] == ["output.uri"]
    unknown, none = check_space("s3://bucket/out", s3.options, 1e18)
    assert (none, unknown.problems) == (None, [])
    assert "unknown" in unknown.notes[0]


@pytest.fixture
def proxy(s3: S3) -> Iterator[FaultProxy]:
    with FaultProxy(s3.options["endpoint_url"]) as running:
        yield running


def through(proxy: FaultProxy, s3: S3) -> dict[str, Any]:
    return {**s3.options, "endpoint_url": proxy.uri, "config_kwargs": {"retries": {"max_attempts": 0}}}


def left_in(uri: str, s3: S3) -> list[str]:
    fs = fsspec.filesystem("s3", **s3.options)
    fs.invalidate_cache()
    return sorted(fs.find(uri))


def test_an_s3_bucket_is_left_as_it_was(s3: S3) -> None:
    uri = f"s3://{s3.bucket('preflight-fine')}/labels"
    fsspec.filesystem("s3", **s3.options).pipe_file(f"{uri}/keep", b"kept")
    assert probe_output(uri, s3.options, delta=True).problems == []
    assert left_in(uri, s3) == [f"{uri.removeprefix('s3://')}/keep"]


@pytest.mark.parametrize(
    ("method", "path", "action", "permission"),
    [
        ("PUT", r"/_preflight-.*/probe", "write", "s3:PutObject"),
        ("GET", r"/_preflight-.*/probe", "read", "s3:GetObject"),
        ("GET", r"list-type=2", "list", "s3:ListBucket"),
        ("PUT", r"_delta_log/", "commit", "region, endpoint and credentials"),
    ],
)
def test_a_missing_right_is_named_and_nothing_stays(
    s3: S3, proxy: FaultProxy, method: str, path: str, action: str, permission: str
) -> None:
    uri = f"s3://{s3.bucket(f'preflight-{action}')}/labels"
    proxy.faults.append(Fault(method=method, path=path, status=403, body=FORBIDDEN))
    found = probe_output(uri, through(proxy, s3), delta=True)
    named = [item for item in found.problems if item.what.startswith(f"cannot {action}")]
    assert len(named) == 1, found.problems
    assert uri in named[0].what
    assert permission in named[0].remedy
    assert left_in(uri, s3) == []


def test_a_probe_that_cannot_be_deleted_is_named(s3: S3, proxy: FaultProxy) -> None:
    uri = f"s3://{s3.bucket('preflight-delete')}/labels"
    proxy.faults += [Fault(method=method, path=what, status=403, body=FORBIDDEN)
                     for method, what in (("DELETE", ""), ("POST", "delete"))]  # fmt: skip
    found = probe_output(uri, through(proxy, s3), delta=False)
    (problem,) = found.problems
    assert problem.what.startswith("cannot delete")
    assert PREFIX in problem.what
    assert "s3:DeleteObject" in problem.remedy
    assert len(left_in(uri, s3)) == 1


def test_a_bucket_that_is_not_there_is_a_problem(s3: S3) -> None:
    found = probe_output("s3://preflight-no-such-bucket/labels", s3.options, delta=True)
    assert any(item.what.startswith("cannot write") for item in found.problems)
