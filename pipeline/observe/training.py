"""The observer of one training run on the driver: its events become metrics, log lines, a bill, and what limited it."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline.config_train import TrainConfig
from pipeline.observe.cost import Bill, CostMeter
from pipeline.observe.log import EventLog
from pipeline.observe.metrics import Metrics, NoMetrics
from pipeline.observe.stalls import ADVICE, BUSY_SHARE, Stalls
from pipeline.training.events import EpochDone, Event, Saved, SaveFailed, StepDone, Stopped
from pipeline.training.timing import ACTIVITIES

__all__ = ["TrainObserver", "attribute_training"]

# By timing.ACTIVITIES: what a run is bound by, what its steps wait for, and what would make it faster.
BOUNDS = {
    "read": (
        "reader",
        "its images to be read, decoded and augmented",
        "more resources.decode_threads, or CPUs of other nodes (resources.layout=split)",
    ),
    "validate": ("validation", "validation", "validation.every_epochs, or fewer images to validate on"),
    "save": ("storage", "checkpoints to be written", "fewer checkpoints (checkpoint.every_steps), or nearer storage"),
}


def attribute_training(seconds: Mapping[str, float]) -> Stalls:
    """Where the time of a training's workers went. seconds: by timing.ACTIVITIES."""
    total = sum(seconds.values())
    if total <= 0:
        return Stalls(bound="start-up", busy_share=0.0, waits={}, sentence="no epoch was learned from in this run")
    busy_share = seconds["learn"] / total
    waits = {bound: seconds[name] / total for name, (bound, _, _) in BOUNDS.items() if seconds[name] > 0}
    if busy_share >= BUSY_SHARE:
        says = f"accelerator-bound: steps took {busy_share:.0%} of the time: {ADVICE['accelerator']} would help"
        return Stalls(bound="accelerator", busy_share=busy_share, waits=waits, sentence=says)
    bound, waited_for, advice = max(BOUNDS.values(), key=lambda entry: waits.get(entry[0], 0.0))
    says = (
        f"{bound}-bound: steps took {busy_share:.0%} of the time, and {waits[bound]:.0%} went by waiting for "
        f"{waited_for}: {advice} would help"
    )
    return Stalls(bound=bound, busy_share=busy_share, waits=waits, sentence=says)


class TrainObserver:
    """Not thread-safe. total: images of all epochs."""

    def __init__(
        self,
        config: TrainConfig,
        images: int,
        *,
        log: EventLog,
        metrics: Metrics | None = None,
        meter: CostMeter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """images: of one epoch."""
        self.total = config.epochs * images
        self.log = log
        self.metrics: Metrics = metrics or NoMetrics()
        self.meter = meter
        self.images = 0
        self.deaths = 0
        self._epoch_images = images
        self._batch_images = config.batch_images
        self._steps_per_epoch = 1
        self._clock = clock
        self._at = 0  # images that are behind the workers, of all epochs
        self._since: float | None = None
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)

    def started(self, workers: int, done: int, steps_per_epoch: int) -> None:
        """Workers go on after step `done`. What they make again, because it was lost, counts again."""
        self._steps_per_epoch = steps_per_epoch
        self._at = self._images_until(done)
        if self._since is None:
            self._since = self._clock()
        self.log.write("workers_started", workers=workers, step=done)

    def failed(self, reason: str, *, died: bool) -> None:
        """The workers end, and are started again."""
        self.deaths += died
        self.log.write("worker_death" if died else "retry", "warning", message=reason)

    def event(self, event: Event) -> None:
        """Something has happened."""
        if self.meter is not None:
            now = self._clock()
            self.meter.sample(now)
            self.metrics.set("maskmill_cost", self.meter.so_far(now))
        if isinstance(event, StepDone):
            self._advance(event.done)
            self.metrics.set("maskmill_train_loss", event.result.loss)
        elif isinstance(event, EpochDone):
            # Not every step is told, but this is the last of an epoch.
            self._advance(int(event.row["step"] or 0))
            for failure in event.failures:
                self.log.write(
                    "failed_row",
                    "error",
                    image_id=failure.image_id,
                    error_type=failure.error_type,
                    message=failure.message,
                )
            for activity, seconds in event.seconds.items():
                self._seconds[activity] += seconds
            self.log.write("epoch", **event.row)
        elif isinstance(event, Saved):
            self.log.write("model" if event.published else "checkpoint", uri=event.uri, step=event.checkpoint.step)
        elif isinstance(event, SaveFailed):
            self.log.write("not_written", "warning", what=event.what, message=str(event.error))
        elif isinstance(event, Stopped):
            self.log.write("workers_stopped", "warning", epoch=event.epoch, step=event.step)

    def speed(self, images_per_s: float) -> None:
        """Of the last minute."""
        self.metrics.set("maskmill_train_images_per_second", images_per_s)

    def stalls(self) -> Stalls:
        """What limits it, from the epochs that are behind it."""
        return attribute_training(self._seconds)

    def bill(self) -> Bill | None:
        """What it costs so far, where the config has prices; the rest at the speed of this command's own images."""
        if self.meter is None:
            return None
        left = self.total - self._at
        return self.meter.bill(self._clock(), images=self.images, left=left, working_since_s=self._since)

    def observed(self) -> dict[str, Any]:
        """For run.json."""
        bill = self.bill()
        return {
            "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "images": self.images,
            "worker_deaths": self.deaths,
            "accelerator": self.stalls().as_json(),
            "cost": bill and bill.as_json(),
        }

    def _advance(self, done: int) -> None:
        images = max(0, self._images_until(done) - self._at)
        if images:
            self._at += images
            self.images += images
            self.metrics.add("maskmill_train_images_total", images)

    def _images_until(self, done: int) -> int:
        """Images of the first `done` steps; an epoch's last one may be smaller."""
        epochs, steps = divmod(done, self._steps_per_epoch)
        return epochs * self._epoch_images + min(steps * self._batch_images, self._epoch_images)
