"""Jobs sent to a real cluster that `ray start` began, from another folder, as a user would."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deltalake import DeltaTable
from local_cluster import LocalCluster

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).resolve().parents[2]
SCENES = ("source.format=scenes", "source.width=64", "source.height=48", "source.targets=[]")
UNET = ("models.0.name=unet_small", "models.0.weights=bundled:unet_small_scenes")


@pytest.fixture(scope="module")
def jobs() -> Iterator[LocalCluster]:
    """A cluster of one node with a job server."""
    with LocalCluster(nodes=1, job_server=True) as cluster:
        yield cluster


def submit(jobs: LocalCluster, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """As somebody who has the cluster's token, but is on no cluster."""
    own = {name: value for name, value in jobs.environment.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", "submit", *arguments, "--address", jobs.job_server],
        cwd=folder,
        env={**own, "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def rows(table: Path) -> list[dict[str, object]]:
    columns = ["image_id", "status", "model_version"]
    return sorted(DeltaTable(str(table)).to_pyarrow_table(columns=columns).to_pylist(), key=lambda row: row["image_id"])


def test_a_job_runs_is_followed_and_goes_on(jobs: LocalCluster, tmp_path: Path) -> None:
    output = tmp_path / "labels"
    line = ("label", *SCENES, *UNET, f"output.uri={output}")
    done = submit(jobs, tmp_path, *line, "source.count=6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "planned 1 units" in done.stdout
    assert f"table: {output}" in done.stdout
    assert done.stderr == ""
    found = rows(output)
    assert [row["status"] for row in found] == ["ok"] * 6
    again = submit(jobs, tmp_path, *line, "source.count=6")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing was left to label" in again.stdout
    assert rows(output) == found


def test_what_the_server_refuses_is_one_line(jobs: LocalCluster, tmp_path: Path) -> None:
    for arguments, variables, message in (
        (("--status", "nothing"), {}, "no job 'nothing'"),
        (("--stop", "nothing"), {"RAY_AUTH_TOKEN": "0" * 64}, "asks for its token"),
    ):
        done = submit(jobs, tmp_path, *arguments, **variables)
        assert done.returncode == 2, done.stdout + done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_job_is_left_looked_at_and_stopped(jobs: LocalCluster, tmp_path: Path) -> None:
    """Its exit code is the driver's: 130, as where it is interrupted here, and what it committed stays."""
    output = tmp_path / "labels"
    line = ("label", *SCENES, *UNET, f"output.uri={output}", "source.count=100000", "output.commit_interval_s=1")
    left = submit(jobs, tmp_path, *line, "--no-wait", "--id", "long-one")
    assert left.returncode == 0, left.stdout + left.stderr
    assert left.stdout.startswith("submitted long-one\n")
    for _ in range(240):
        if (output / "_delta_log").is_dir() and rows(output):
            break
        time.sleep(0.5)
    assert "long-one: RUNNING" in submit(jobs, tmp_path, "--status", "long-one").stdout
    assert submit(jobs, tmp_path, "--stop", "long-one").stdout == "long-one: asked to stop\n"
    followed = submit(jobs, tmp_path, "--logs", "long-one")
    assert followed.returncode == 130, followed.stdout + followed.stderr
    assert "planned" in followed.stdout
    assert all(row["status"] == "ok" for row in rows(output))
    assert submit(jobs, tmp_path, "--stop", "long-one").stdout == "long-one: it had ended\n"
