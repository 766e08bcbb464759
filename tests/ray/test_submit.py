"""Jobs sent to a real cluster that `ray start` began, from another folder, as a user would."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from deltalake import DeltaTable

pytestmark = pytest.mark.long

TOKEN = secrets.token_hex(32)
REPOSITORY = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
SCENES = ("source.format=scenes", "source.width=64", "source.height=48", "source.targets=[]")
UNET = ("models.0.name=unet_small", "models.0.weights=bundled:unet_small_scenes")


def environment() -> dict[str, str]:
    """Of somebody who has the cluster's token, is on no cluster yet, and needs no proxy to reach this machine."""
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS" and "proxy" not in key.lower()}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    return {**own, **token, "PATH": f"{RAY.parent}{os.pathsep}{own['PATH']}"}


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The job server's address of a cluster of one node, with processes of its own."""
    head, dashboard, agent, client = free_ports(4)
    # Of its own, or it would become the cluster that others on this machine join; and short, for Unix sockets.
    home = tempfile.mkdtemp(prefix="maskmill-")
    log = tmp_path_factory.mktemp("cluster") / "ray.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                str(RAY), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={head}",
                f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
                f"--ray-client-server-port={client}", "--num-cpus=2", "--object-store-memory=200000000",
                "--disable-usage-stats", f"--temp-dir={home}",
            ],
            stdout=output, stderr=subprocess.STDOUT, env=environment(), cwd=log.parent, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                asked = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
                straight.open(asked, timeout=10).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the job server did not answer: {log.read_text()[-2000:]}")
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


def submit(address: str, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", "submit", *arguments, "--address", address],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def rows(table: Path) -> list[dict[str, object]]:
    columns = ["image_id", "status", "model_version"]
    return sorted(DeltaTable(str(table)).to_pyarrow_table(columns=columns).to_pylist(), key=lambda row: row["image_id"])


def test_a_job_runs_is_followed_and_goes_on(cluster: str, tmp_path: Path) -> None:
    output = tmp_path / "labels"
    line = ("label", *SCENES, *UNET, f"output.uri={output}")
    done = submit(cluster, tmp_path, *line, "source.count=6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "planned 1 units" in done.stdout
    assert f"table: {output}" in done.stdout
    assert done.stderr == ""
    found = rows(output)
    assert [row["status"] for row in found] == ["ok"] * 6
    again = submit(cluster, tmp_path, *line, "source.count=6")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing was left to label" in again.stdout
    assert rows(output) == found


def test_what_the_server_refuses_is_one_line(cluster: str, tmp_path: Path) -> None:
    for arguments, variables, message in (
        (("--status", "nothing"), {}, "no job 'nothing'"),
        (("--stop", "nothing"), {"RAY_AUTH_TOKEN": "0" * 64}, "asks for its token"),
    ):
        done = submit(cluster, tmp_path, *arguments, **variables)
        assert done.returncode == 2, done.stdout + done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_job_is_left_looked_at_and_stopped(cluster: str, tmp_path: Path) -> None:
    """Its exit code is the driver's: 130, as where it is interrupted here, and what it committed stays."""
    output = tmp_path / "labels"
    line = ("label", *SCENES, *UNET, f"output.uri={output}", "source.count=100000", "output.commit_interval_s=1")
    left = submit(cluster, tmp_path, *line, "--no-wait", "--id", "long-one")
    assert left.returncode == 0, left.stdout + left.stderr
    assert left.stdout.startswith("submitted long-one\n")
    for _ in range(240):
        if (output / "_delta_log").is_dir() and rows(output):
            break
        time.sleep(0.5)
    assert "long-one: RUNNING" in submit(cluster, tmp_path, "--status", "long-one").stdout
    assert submit(cluster, tmp_path, "--stop", "long-one").stdout == "long-one: asked to stop\n"
    followed = submit(cluster, tmp_path, "--logs", "long-one")
    assert followed.returncode == 130, followed.stdout + followed.stderr
    assert "planned" in followed.stdout
    assert all(row["status"] == "ok" for row in rows(output))
    assert submit(cluster, tmp_path, "--stop", "long-one").stdout == "long-one: it had ended\n"
