"""`maskmill train` when things go wrong: bad images and targets, losses, disks, storage, signals, and models."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fault_proxy import Fault, FaultProxy
from job_helpers import jpeg, png, tar_bytes
from s3_endpoint import S3
from safetensors.torch import load
from torch import Tensor
from train_helpers import BATCH, LEARNING, SCENES, STEPS, assert_equal, history, run_train, weights

from jobs import train
from pipeline import trainer
from pipeline.config import ModelConfig
from pipeline.config_train import TrainConfig
from pipeline.models.load import load_model
from pipeline.sources.registry import open_source
from pipeline.sources.scenes import render_scene
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.order import EpochOrder
from pipeline.training.plan import plan_source

# Besides those at the ends of epochs, after 4, 8 and 12 steps.
CHECKPOINTS = ("checkpoint.every_steps=3", "checkpoint.keep=1")
START_S = 150.0


class Command:
    """The same as a process of its own, on the cluster at `address`. log: where its words go."""

    def __init__(self, address: str, log: Path, *arguments: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "jobs.train", *SCENES, *LEARNING, *arguments]
        with log.open("wb") as sink:
            environment = {**os.environ, "RAY_ADDRESS": address}
            self.process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)

    @property
    def words(self) -> str:
        return self._log.read_text()

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + START_S
        while words not in self.words:
            assert self.process.poll() is None, self.words
            assert time.monotonic() < deadline, self.words
            time.sleep(0.05)

    def end(self, seconds: float) -> int:
        """The exit code; it must end by itself."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s: {self.words}")


@pytest.fixture
def start(tmp_path: Path, cluster: str) -> Iterator[Callable[..., Command]]:
    """Starts a Command, which is killed where the test leaves it running."""
    started: list[Command] = []

    def begin(*arguments: str) -> Command:
        started.append(Command(cluster, tmp_path / f"log{len(started)}", *arguments))
        return started[-1]

    yield begin
    for command in started:
        command.process.kill()
        command.process.wait()


def last_step(uri: Path | str, storage: dict[str, Any] | None = None) -> int:
    """Of the newest checkpoint; it is read and held against its hashes."""
    found = CheckpointStore(str(uri), storage or {}).newest()
    assert found is not None
    return found[0].step


@pytest.mark.long
def test_images_that_cannot_be_learned_from_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within the failure budget; tests/training/test_loop.py has what is learned from the others, and the budget."""
    members = {}
    for index in range(12):
        scene = render_scene(index, width=64, height=48)
        members |= {f"{index:02}.jpg": jpeg(index, 64, 48), f"{index:02}.seg.png": png(scene.semantic_HW)}
    members["02.seg.png"] = png(np.zeros((24, 32), np.uint8))
    members["09.jpg"] = members["09.jpg"][:700]
    shard = tmp_path / "bad.tar"
    shard.write_bytes(tar_bytes(members))
    arguments = [argument for argument in SCENES if not argument.startswith("source")]
    source = ("source.format=webdataset", f"source.uri={shard}")
    more = ("epochs=1", "failure_budget=0.25", f"output.uri={tmp_path / 'out'}")
    assert train.main([*arguments, *LEARNING, *source, *more]) == 0
    said = capsys.readouterr().err
    assert "not learned from: bad.tar/02: TargetMismatchError: " in said
    assert "not learned from: bad.tar/09: CorruptImageError: " in said
    assert [(row["images"], row["failed"]) for row in history(tmp_path / "out")] == [(10, 2)]


def test_a_loss_that_is_not_finite_names_the_batch(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fourth epoch, of two workers, whose first step leads nowhere."""
    output = tmp_path / "out"
    shutil.copytree(trained, output)
    far = ("epochs=4", "optimizer.learning_rate=1e30", "resources.workers=2")
    assert run_train(output, *far) == 1
    said = capsys.readouterr().err
    (report,) = output.glob("diverged-*.json")
    found = json.loads(report.read_text())
    assert found["epoch"] == 3
    assert found["step"] == 1
    run = json.loads((output / "run.json").read_text())
    assert run["state"] == "stopped"
    plan = plan_source(open_source(TrainConfig.model_validate(run["config"]).source))
    group = EpochOrder(plan.named_rows, seed=0, epoch=3, shuffle_images=2000).group(0)
    places = [*zip(group.unit_N.tolist(), group.position_N.tolist(), strict=True)][BATCH : 2 * BATCH]
    expected = [f"scenes/seed0-64x48/{10 * unit + position:09d}" for unit, position in places]
    assert found["image_ids"] == expected
    line = said.splitlines()[-1]
    assert "expected a finite loss and gradient, got " in line
    assert all(name in line for name in (*expected, str(report)))
    assert last_step(output) == STEPS
    assert_equal(weights(output), weights(trained))
    newest = CheckpointStore(str(output), {}).list()[-1]
    model = load_model(ModelConfig(weights=str(output / "checkpoints" / newest.name)), seed=0, tile_pixels=2**20)
    assert all(torch.isfinite(tensor).all() for tensor in model.module.state_dict().values())


# One checkpoint is 3.3 MB. Room for one and a half, and for figures and pictures.
FULL_DISK = """
mount -t tmpfs -o size=16m none "$out" || exit 97
head -c 11M /dev/zero > "$out/filler"
"$@" > "$report/first.log" 2>&1
echo $? > "$report/first.code"
rm "$out/filler"
cp -r "$out" "$report/first"
"""


@pytest.mark.long
def test_a_full_disk_costs_what_does_not_fit_and_no_more(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "out", tmp_path / "report"
    out.mkdir()
    report.mkdir()
    own_mounts = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    probe = subprocess.run([*own_mounts, f"mount -t tmpfs none {out}"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no file system of its own for the test: {probe.stderr.strip()}")
    command = [sys.executable, "-m", "jobs.train", *SCENES, *LEARNING, *CHECKPOINTS, f"output.uri={out}"]
    places = {"out": str(out), "report": str(report)}
    script = [*own_mounts, FULL_DISK, "sh", *command, "checkpoint.attempts=1"]
    subprocess.run(script, env={**os.environ, "RAY_ADDRESS": ""} | places, check=True)

    first = (report / "first.log").read_text()
    assert (report / "first.code").read_text().strip() == "4", first
    lost = re.findall(r"^checkpoint not written: .*No space left on device; training goes on", first, re.MULTILINE)
    assert len(lost) == 4  # of steps 4, 6, 8 and 9
    line = first.splitlines()[-1]
    assert line.startswith(f"maskmill: error: the checkpoint of step {STEPS} was not written: {out}")
    assert line.endswith("No space left on device; the same command goes on from the last whole checkpoint")
    assert json.loads((report / "first" / "run.json").read_text())["state"] == "stopped"
    assert last_step(report / "first") == 3
    assert sorted(path.suffix for path in (report / "first" / "checkpoints").iterdir()) == ["", ".json"]
    assert history(report / "first") == history(trained)

    assert run_train(report / "first", *CHECKPOINTS) == 0
    assert "going on after step 3" in capsys.readouterr().err
    assert_equal(weights(report / "first"), weights(trained))
    assert history(report / "first") == history(trained)


@pytest.fixture
def proxy(s3: S3) -> Iterator[FaultProxy]:
    with FaultProxy(s3.options["endpoint_url"]) as running:
        yield running


def through(proxy: FaultProxy, s3: S3, *, read_timeout: int = 2) -> dict[str, Any]:
    """s3fs's options, with one try of each request."""
    patience = {"retries": {"max_attempts": 0}, "read_timeout": read_timeout}
    return {**s3.options, "endpoint_url": proxy.uri, "config_kwargs": patience}


def stored_weights(uri: str, s3: S3) -> dict[str, Tensor]:
    return load(fsspec.filesystem("s3", **s3.options).cat_file(f"{uri}/checkpoint/model.safetensors"))


@pytest.mark.long
def test_storage_that_fails_for_a_while_and_for_a_whole_checkpoint(
    trained: Path, s3: S3, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"s3://{s3.bucket('train-faults')}/run"
    broken: dict[str, Any] = {"what": "status", "status": 500, "body": b""}
    passing = [
        Fault(method="PUT", path="/step-0+3-.*/model", what="reset", times=1),
        Fault(method="PUT", path="/step-0+3-.*/state.safetensors", what="stall", seconds=3, times=1),
        Fault(method="PUT", path="/step-0+3-[^/]*json$", times=1, forwarded=True, **broken),
        Fault(method="PUT", path="/step-0+8-.*/model", times=1, **broken),
        Fault(method="POST", path="/train-faults[?]delete", times=2, **broken),
        Fault(method="PUT", path="/metrics.jsonl", times=2, **broken),
        Fault(method="PUT", path="/run/checkpoint/model", times=1, **broken),
    ]
    lasting = Fault(method="PUT", path="/step-0+6-.*/state", **broken)
    proxy.faults += [*passing, lasting]
    options = (f"output.storage={json.dumps(through(proxy, s3))}", "checkpoint.attempts=2")
    assert run_train(uri, *CHECKPOINTS, *options) == 0
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("checkpoint not written")]
    assert "/step-000000006-" in line
    assert line.endswith("training goes on, the last one is whole")
    (line,) = [line for line in said.splitlines() if line.startswith("history not written")]
    assert "/run/metrics.jsonl" in line
    assert all(fault.seen > fault.times for fault in passing)  # it came again
    assert lasting.seen == 2
    assert proxy.outcomes("PUT", "/step-0+3-.*/model") == ["reset", 200]
    assert_equal(stored_weights(uri, s3), weights(trained))
    store = CheckpointStore(uri, s3.options)
    assert [item.step for item in store.list()] in ([STEPS], [4, STEPS], [8, STEPS])  # with the best
    text = fsspec.filesystem("s3", **s3.options).cat_file(f"{uri}/metrics.jsonl").decode()
    assert [json.loads(line)["loss"] for line in text.splitlines()] == [row["loss"] for row in history(trained)]


@pytest.mark.long
def test_sigterm_keeps_the_very_step(
    trained: Path,
    s3: S3,
    proxy: FaultProxy,
    start: Callable[..., Command],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It comes while a checkpoint is written: that one is finished, one more step is done, and that is kept too."""
    uri = f"s3://{s3.bucket('train-sigterm')}/run"
    writing = Fault(method="PUT", path="/step-0+3-.*/state.json", what="hold")
    proxy.faults.append(writing)
    output = (f"output.uri={uri}", f"output.storage={json.dumps(through(proxy, s3, read_timeout=60))}")
    command = start(*output, *CHECKPOINTS)
    assert writing.reached.wait(START_S), command.words
    command.process.send_signal(signal.SIGTERM)
    command.wait_for("stopping: a checkpoint is written first")
    time.sleep(1)  # for the wish to be known
    writing.released.set()
    assert command.end(60) == 130
    assert f"stopped after step 4: {uri}/checkpoints/step-000000004-" in command.words
    assert "interrupted; " in command.words.splitlines()[-1]
    files = fsspec.filesystem("s3", **s3.options)
    assert json.loads(files.cat_file(f"{uri}/run.json"))["state"] == "interrupted"
    assert last_step(uri, s3.options) == 4
    # Going on needs the checkpoint: half of an answer, and then a moment without one.
    half = Fault(method="GET", path="/step-0+4-.*/state.safetensors", what="cut", times=1)
    none = Fault(method="GET", path="/step-0+4-.*/model", times=1, status=500, body=b"")
    proxy.faults[:] = [half, none]
    capsys.readouterr()
    assert run_train(uri, *output, *CHECKPOINTS) == 0
    said = capsys.readouterr().err
    assert "going on after step 4" in said
    assert "worker 0" not in said
    assert min(half.seen, none.seen) > 1
    assert_equal(stored_weights(uri, s3), weights(trained))
    text = files.cat_file(f"{uri}/metrics.jsonl").decode()
    assert [json.loads(line)["mIoU"] for line in text.splitlines()] == [row["mIoU"] for row in history(trained)]


def test_sigterm_while_there_is_no_room_for_the_workers(tmp_path: Path, start: Callable[..., Command]) -> None:
    command = start(f"output.uri={tmp_path / 'out'}", "resources.workers=5000")
    command.wait_for("waiting for room: 5000 workers need 2500 CPUs of which the cluster has ")
    time.sleep(1)  # Ray Train begins to wait
    command.process.send_signal(signal.SIGTERM)
    assert command.end(30) == 130
    assert "no worker is at work, so there is no checkpoint to write" in command.words
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == "interrupted"


@pytest.mark.long
def test_one_worker_that_ends_alone_ends_the_run(tmp_path: Path, start: Callable[..., Command]) -> None:
    """Though the other waits for it, in a sum that nobody else joins."""
    bad = ("model.name=null", "model.spec=fault_models:ENDS_ALONE", "resources.workers=2")
    command = start(f"output.uri={tmp_path / 'out'}", *bad)
    command.wait_for("error: ")
    assert command.end(30) == 2
    assert command.words.splitlines()[-1] == "maskmill: error: expected another world, got this one"


@pytest.mark.long
def test_a_model_with_a_bug_is_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "MAX_FAILURES", 1)
    monkeypatch.setattr(trainer, "SAME_FAILURES", 2)
    assert run_train(tmp_path, "model.name=null", "model.spec=fault_models:RAISES") == 1
    *_, once, again, line = capsys.readouterr().err.splitlines()
    reason = r"worker 0 failed: KeyError after step 0 at fault_models.py:\d+: 'neck'"
    assert re.fullmatch(reason, once)
    assert again == "from the beginning; 4 steps an epoch"
    assert re.fullmatch(f"maskmill: error: {reason}, 2 times in a row", line)
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "stopped"


@pytest.mark.long
def test_more_deaths_than_it_survives_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "MAX_FAILURES", 0)
    assert run_train(tmp_path, "model.name=null", "model.spec=fault_models:DIES") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("maskmill: error: the workers failed more than 0 times, the last time: worker 0 died: The ")
