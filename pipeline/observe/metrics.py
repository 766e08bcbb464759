"""The metrics of a run by name: what each means and by what it is told apart; whoever exports them looks here."""

from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["METRICS", "Metric", "Metrics", "NoMetrics"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A counter only grows; a gauge is what is."""

    kind: Literal["counter", "gauge"]
    description: str
    tags: tuple[str, ...] = ()


METRICS = {
    "maskmill_images_total": Metric("counter", "Rows booked, by model and status (ok, failed)", ("model", "status")),
    "maskmill_bytes_read_total": Metric("counter", "Encoded bytes of images and targets that were read"),
    "maskmill_rows_committed_total": Metric("counter", "Rows that became part of the table"),
    "maskmill_stage_seconds_total": Metric(
        "counter", "Thread seconds by stage (read, decode, predict, encode, write; wait: the accelerators')", ("stage",)
    ),
    "maskmill_batch_pixels": Metric("gauge", "Padded pixels of a batch, mean of the last second's"),
    "maskmill_accelerator_busy_share": Metric("gauge", "Share of the last minute in which accelerators were at work"),
    "maskmill_commit_lag_seconds": Metric("gauge", "Age of the oldest row that is written and not committed"),
    "maskmill_queue_items": Metric(
        "gauge", "What waits: units to do, files to commit, batches for an accelerator (mean)", ("queue",)
    ),
    "maskmill_cost": Metric("gauge", "Cost of this run so far, in the config's currency"),
    "maskmill_train_images_total": Metric("counter", "Images learned from, over all workers"),
    "maskmill_train_loss": Metric("gauge", "Loss of the last step"),
    "maskmill_train_images_per_second": Metric("gauge", "Images learned from a second, over the last minute"),
}


class Metrics(Protocol):
    """Where figures go. name: of METRICS; tags: all that it has."""

    def add(self, name: str, value: float, **tags: str) -> None:
        """Count `value` more."""
        ...

    def set(self, name: str, value: float, **tags: str) -> None:
        """It is `value` now."""
        ...


class NoMetrics:
    """Nobody looks."""

    def add(self, name: str, value: float, **tags: str) -> None:
        """Nothing."""

    def set(self, name: str, value: float, **tags: str) -> None:
        """Nothing."""
