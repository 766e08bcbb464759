"""`maskmill train` on Ray Train: its checkpoint labels, deaths cost nothing, and workers share without a trace."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray_helpers import rows_of, run_label
from safetensors.torch import load_file

from jobs import train

SCENES = (
    "source.format=scenes",
    "source.count=24",
    "source.width=64",
    "source.height=48",
    "source.unit_images=10",
    "validation.source.format=scenes",
    "validation.source.count=7",
    "validation.source.seed=9",
    "validation.source.width=64",
    "validation.source.height=48",
)
MODEL = ("model.name=unet_small", "batch_images=6", "optimizer.learning_rate=0.004", "resources.torch_threads=1")
# Statistics of whole batches, whatever the workers' shares.
EXACT = ("batch_norm=synced", "optimizer.kind=sgd", "augment.flip=0.5")


def run_train(output: Path, *arguments: str) -> int:
    """`maskmill train` in this process; the exit code."""
    return train.main([*SCENES, *MODEL, f"output.uri={output}", *arguments])


def history(output: Path) -> list[dict[str, Any]]:
    """What is the same for every run of the same seed: not how long it took."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "images_per_s", "ended_at")}
        for row in rows
    ]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The published model."""
    return load_file(output / "checkpoint" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of one worker."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_train(folder, *EXACT, "epochs=3") == 0
    return folder


def test_the_checkpoint_is_a_model(trained: Path, tmp_path: Path) -> None:
    rows = history(trained)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["images"] == 24 and row["failed"] == 0 for row in rows)
    assert json.loads((trained / "run.json").read_text())["state"] == "done"
    arguments = ("source.format=scenes", "source.count=3", f"models.0.weights={trained / 'checkpoint'}")
    assert run_label(*arguments, f"output.uri={tmp_path}") == 0
    assert {row["status"] for row in rows_of(tmp_path)} == {"ok"}


def test_two_workers_learn_what_one_does(tmp_path: Path) -> None:
    shared = ("resources.workers=2", "resources.cpus_per_worker=0.5")
    for name, more in (("one", ()), ("two", shared)):
        assert run_train(tmp_path / name, "optimizer.kind=sgd", "batch_norm=frozen", "epochs=1", *more) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-5, atol=1e-5), name
    (alone,), (together,) = history(tmp_path / "one"), history(tmp_path / "two")
    assert alone["loss"] == pytest.approx(together["loss"], rel=1e-6)
    assert alone["mIoU"] == pytest.approx(together["mIoU"], abs=1e-3)


def test_reading_on_ray_data_learns_the_same(trained: Path, tmp_path: Path) -> None:
    """Order, shares and pixels are those of reading in the worker, with two workers as with one."""
    split = ("resources.layout=split", "resources.readers=1", "resources.cpus_per_worker=0.3")
    assert run_train(tmp_path / "one", *EXACT, "epochs=3", *split) == 0
    assert all(torch.equal(tensor, weights(tmp_path / "one")[name]) for name, tensor in weights(trained).items())
    assert history(tmp_path / "one") == history(trained)


def test_a_split_layout_without_room_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(tmp_path, "resources.layout=split", "resources.cpus_per_worker=2", "epochs=1") == 2
    assert "expected 1.25 CPUs for each of 1 workers beside their own 2" in capsys.readouterr().err


def test_it_begins_with_the_workers_that_there_is_room_for(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three workers two fit; what they learn is what any number of workers learns."""
    elastic = ("resources.workers=3", "resources.min_workers=1", "resources.cpus_per_worker=1")
    assert run_train(tmp_path, *EXACT, "epochs=3", *elastic) == 0
    assert "from the beginning with 2 of 3 workers" in capsys.readouterr().err
    for row, alone in zip(history(tmp_path), history(trained), strict=True):
        assert row["images"] == 24
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_a_run_that_has_ended_has_nothing_to_do(trained: Path) -> None:
    before = weights(trained)
    assert run_train(trained, *EXACT, "epochs=3") == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trained).items())


@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_a_death_leaves_no_trace(trained: Path, tmp_path: Path, victim: str) -> None:
    """Killed after its first checkpoint inside an epoch; the same command, or Ray Train by itself, goes on."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "jobs.train", *SCENES, *MODEL, *EXACT, "epochs=3", f"output.uri={output}"]
    command.append("checkpoint.every_steps=1")
    environment = {**os.environ, "RAY_ADDRESS": ""}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    deadline = time.monotonic() + 150
    while len(list(output.glob("**/model.safetensors"))) < 2:
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if victim == "driver":
        process.send_signal(signal.SIGKILL)
        process.wait()
        ended = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert ended.returncode == 0, ended.stderr.decode()
    else:
        children = psutil.Process(process.pid).children(recursive=True)
        (worker,) = [child for child in children if _title(child).startswith("ray::RayTrainWorker")]
        worker.kill()
        words = process.communicate(timeout=200)[0].decode()
        assert process.returncode == 0, words
        assert "going on after step" in words
    assert all(torch.equal(tensor, weights(output)[name]) for name, tensor in weights(trained).items())
    assert history(output) == history(trained)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
