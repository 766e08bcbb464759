"""The observer of a training run: images counted exactly through throttled events and lost steps."""

import io
import json

import pytest
from observe_helpers import Clock, Recorded

from pipeline.config import CostConfig
from pipeline.config_train import TrainConfig
from pipeline.errors import StorageError
from pipeline.observe.cost import ClusterSize, CostMeter
from pipeline.observe.log import EventLog
from pipeline.observe.training import TrainObserver, attribute_training
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.events import EpochDone, Saved, SaveFailed, StepDone
from pipeline.training.samples import Failure
from pipeline.training.step import StepResult

CONFIG = TrainConfig.model_validate(
    {
        "source": {"format": "scenes"},
        "model": {"name": "unet_small"},
        "epochs": 2,
        "batch_images": 4,
        "output": {"uri": "memory://x"},
    }
)


def step(done: int, loss: float = 1.0) -> StepDone:
    result = StepResult(loss=loss, gradient_norm=1.0, images=4, failed=0, stop=False)
    return StepDone(epoch=0, step=0, done=done, learning_rate=0.1, result=result)


def test_a_run_with_a_death() -> None:
    metrics, clock, text = Recorded(), Clock(), io.StringIO()
    meter = CostMeter(CostConfig(per_node_hour=36.0), lambda: ClusterSize(nodes=1, gpus=0, cpus=0))
    meter.sample(0)
    observer = TrainObserver(CONFIG, 10, log=EventLog(text, run_id="r"), metrics=metrics, meter=meter, clock=clock)
    assert observer.total == 20
    observer.started(2, 0, 3)  # three steps an epoch: 4, 4 and 2 images
    observer.event(step(2, 0.5))  # the first was not told
    assert observer.images == 8
    observer.failed("worker 1 died", died=True)
    observer.started(2, 1, 3)  # a step is lost and made again
    observer.event(step(2))
    assert observer.images == 12
    failure = Failure("a.tar/1", "CorruptImageError", "cut off")
    spent = {"read": 6.0, "learn": 3.0, "validate": 1.0, "save": 0.0}
    observer.event(EpochDone(row={"epoch": 1, "step": 3, "loss": 0.25}, failures=(failure,), seconds=spent))
    assert observer.images == 14
    observer.event(Saved(uri="u/step-3", checkpoint=Checkpoint(name="step-3", step=3, figure=None, files={})))
    observer.event(SaveFailed(error=StorageError("full")))
    observer.event(step(6, 0.125))
    observer.event(step(6, 0.125))
    observer.speed(3.5)
    clock.now = 200.0
    assert observer.images == 24
    assert dict(metrics.values) == {
        ("maskmill_train_images_total",): 24,
        ("maskmill_train_loss",): 0.125,
        ("maskmill_train_images_per_second",): 3.5,
        ("maskmill_cost",): pytest.approx(1.0),
    }
    bill = observer.bill()
    assert bill is not None
    assert (bill.so_far, bill.to_go) == (pytest.approx(2.0), 0)
    observed = observer.observed()
    assert observed["worker_deaths"] == 1
    assert observed["accelerator"]["bound"] == "reader"
    assert observed["accelerator"]["busy_share"] == 0.3
    assert observed["accelerator"]["waits"] == {"reader": 0.6, "validation": 0.1}
    assert [json.loads(line)["event"] for line in text.getvalue().splitlines()] == [
        "workers_started", "worker_death", "workers_started", "failed_row", "epoch", "checkpoint", "not_written",
    ]  # fmt: skip


def test_without_prices_there_is_no_bill() -> None:
    observer = TrainObserver(CONFIG, 10, log=EventLog())
    observer.event(step(1))
    assert observer.bill() is None
    assert observer.observed()["cost"] is None


@pytest.mark.parametrize(
    ("seconds", "bound", "words"),
    [
        ({"read": 1.0, "learn": 9.0, "validate": 0.0, "save": 0.0}, "accelerator", "steps took 90% of the time"),
        ({"read": 1.0, "learn": 4.0, "validate": 5.0, "save": 0.0}, "validation", "validation.every_epochs"),
        ({"read": 1.0, "learn": 1.0, "validate": 0.0, "save": 2.0}, "storage", "50% went by waiting for checkpoints"),
        ({"read": 0.0, "learn": 0.0, "validate": 0.0, "save": 0.0}, "start-up", "no epoch"),
    ],
)
def test_what_limits_a_training(seconds: dict[str, float], bound: str, words: str) -> None:
    found = attribute_training(seconds)
    assert found.bound == bound
    assert words in found.sentence
    assert found.busy_share + sum(found.waits.values()) == pytest.approx(1.0 if any(seconds.values()) else 0.0)
