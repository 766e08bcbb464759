"""Deaths: the driver, an actor, a worker process; and a driver that is told to go."""

import signal
import time
from pathlib import Path

import kills
import pytest
from job_helpers import rows_of, run_json, run_label

COUNT = 60


@pytest.mark.long
@pytest.mark.timeout(600)
def test_killed_and_resumed_is_bit_equal_to_a_clean_run(tmp_path: Path) -> None:
    assert run_label(*kills.arguments(tmp_path / "clean", COUNT, 4)) == 0
    report = kills.kill_session(
        tmp_path / "killed",
        kills=3,
        seed=3,
        count=COUNT,
        rows_per_file=4,
        log=tmp_path / "killed.log",
    )
    assert sum(report.kills.values()) == 3
    expected = kills.table_digest(tmp_path / "clean")
    assert len(expected) == 2 * COUNT
    assert kills.table_digest(tmp_path / "killed") == expected


def test_sigterm_commits_and_exits_130(tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "labels"
    process = kills.start([*kills.command(output, 400, 4), f"ray_address={cluster}"], tmp_path / "log")
    deadline = time.monotonic() + 120
    while not kills.rows_now(output) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert "interrupted" in (tmp_path / "log").read_text()
    assert run_json(output)["state"] == "interrupted"
    rows = rows_of(output, ["image_id", "model"])
    assert 0 < len(rows) < 800
    assert len({(row["image_id"], row["model"]) for row in rows}) == len(rows)
