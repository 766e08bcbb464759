"""`maskmill train` on Ray Train: its checkpoint labels, deaths cost nothing, and workers share without a trace."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from job_helpers import rows_of, run_label
from train_helpers import EPOCHS, IMAGES, LEARNING, SCENES, assert_equal, history, run_train, weights

START_S = 150.0


def test_the_checkpoint_is_a_model(trained: Path, tmp_path: Path) -> None:
    rows = history(trained)
    assert [row["epoch"] for row in rows] == [*range(1, EPOCHS + 1)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["images"] == IMAGES and row["failed"] == 0 for row in rows)
    assert json.loads((trained / "run.json").read_text())["state"] == "done"
    arguments = ("source.format=scenes", "source.count=3", f"models.0.weights={trained / 'checkpoint'}")
    assert run_label(*arguments, f"output.uri={tmp_path}") == 0
    assert {row["status"] for row in rows_of(tmp_path)} == {"ok"}


def test_reading_on_ray_data_learns_the_same(trained: Path, tmp_path: Path) -> None:
    """Order, shares and pixels are those of reading in the worker."""
    split = ("resources.layout=split", "resources.readers=1", "resources.cpus_per_worker=0.3")
    assert run_train(tmp_path, *split) == 0
    assert_equal(weights(tmp_path), weights(trained))
    assert history(tmp_path) == history(trained)


def test_a_split_layout_without_room_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(tmp_path, "resources.layout=split", "resources.cpus_per_worker=2", "epochs=1") == 2
    assert "expected 1.25 CPUs for each of 1 workers beside their own 2" in capsys.readouterr().err


def test_two_workers_learn_what_one_does(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of three workers there is room for two, which begin: each learns from half of every batch.

    The two round otherwise, which statistics of batches carry on for twelve steps; tests/training/test_loop.py holds
    fewer of them to 1e-5.
    """
    elastic = ("resources.workers=3", "resources.min_workers=1", "resources.cpus_per_worker=1")
    assert run_train(tmp_path, *elastic) == 0
    assert "from the beginning with 2 of 3 workers" in capsys.readouterr().err
    one, two = weights(trained), weights(tmp_path)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-3, msg=name)
    for row, alone in zip(history(tmp_path), history(trained), strict=True):
        assert row["images"] == IMAGES
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert row["mIoU"] == pytest.approx(alone["mIoU"], abs=1e-3)


def wait_for_checkpoints(output: Path, count: int, going_on: threading.Event) -> None:
    deadline = time.monotonic() + START_S
    while len(list(output.glob("**/model.safetensors"))) < count:
        assert going_on.is_set()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_dead_worker_leaves_no_trace(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed after its first checkpoint inside an epoch: Ray Train starts another by itself."""
    killed: list[str] = []
    training = threading.Event()
    training.set()

    def kill() -> None:
        wait_for_checkpoints(tmp_path, 2, training)
        for child in psutil.Process().children(recursive=True):
            if _title(child).startswith("ray::RayTrainWorker"):
                killed.append(_title(child))
                child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    code = run_train(tmp_path, "checkpoint.every_steps=1")
    training.clear()
    killer.join()
    said = capsys.readouterr().err
    assert code == 0, said
    assert len(killed) == 1
    assert "going on after step" in said
    assert_equal(weights(tmp_path), weights(trained))
    assert history(tmp_path) == history(trained)


@pytest.mark.long
def test_a_dead_driver_leaves_no_trace(trained: Path, tmp_path: Path, cluster: str) -> None:
    """Killed after its first checkpoint inside an epoch: the same command goes on."""
    more = (*SCENES, *LEARNING, "checkpoint.every_steps=1", f"output.uri={tmp_path}")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.train", *more],
            stdout=log,
            stderr=log,
            env={**os.environ, "RAY_ADDRESS": cluster},
        )
    training = threading.Event()
    training.set()
    try:
        wait_for_checkpoints(tmp_path, 2, training)
    finally:
        process.kill()
        process.wait()
    assert run_train(tmp_path, "checkpoint.every_steps=1") == 0
    assert_equal(weights(tmp_path), weights(trained))
    assert history(tmp_path) == history(trained)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
