"""What a run says: a bar on a terminal, a plain line every ten seconds elsewhere, a summary at the end."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.observe.cost import Bill
from pipeline.printable import PrintableConsole
from pipeline.status import Counts

__all__ = ["Reporter", "counted", "counts_table", "duration", "progress_lines", "stage_shares"]

LINE_EVERY_S = 10.0
RATE_WINDOW_S = 60.0


def stage_shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Thread seconds of each stage as a share of all."""
    total = sum(seconds.values())
    return {stage: value / total if total else 0.0 for stage, value in seconds.items()}


class Reporter:
    """Progress of one run. Everything goes to standard error, so that standard output stays for results."""

    def __init__(self, doing: str = "labelling", *, quiet: bool = False) -> None:
        """doing: what the bar says is done to the images."""
        self._doing = doing
        self.console = PrintableConsole(stderr=True, soft_wrap=not sys.stderr.isatty())
        self._live = self.console.is_terminal and not quiet
        self._quiet = quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._history: list[tuple[float, int]] = []

    def say(self, text: str) -> None:
        """One line about what happens now."""
        if not self._quiet:
            self.console.print(text)

    def start(self, total: int, done: int) -> None:
        """Begin the bar, anew where there is one: `total` images, `done` of them by earlier runs."""
        self.stop()
        self._history = [(time.monotonic(), done)]
        self._last_line = time.monotonic()
        if self._live:
            self._progress = Progress(
                TextColumn(self._doing),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]} img/s  failed {task.fields[failed]}  limit: {task.fields[limit]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                "label", total=total, completed=done, rate="-", failed=0, limit="start-up"
            )

    @property
    def images_per_s(self) -> float:
        """Over the last minute."""
        if not self._history:
            return 0.0
        (then, before), (now, after) = self._history[0], self._history[-1]
        return (after - before) / max(now - then, 1e-9)

    def update(self, *, done: int, total: int, failed: int, limit: str, cost: str = "") -> None:
        """Show where the run is; done and total in images, failed in rows. cost: so far and to go, where known."""
        now = time.monotonic()
        self._history.append((now, done))
        while len(self._history) > 2 and now - self._history[0][0] > RATE_WINDOW_S:
            self._history.pop(0)
        rate = self.images_per_s
        cost = f"  cost {cost}" if cost else ""
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task,
                completed=done,
                total=max(total, done),
                rate=f"{rate:.1f}",
                failed=failed,
                limit=f"{limit}{cost}",
            )
        elif not self._quiet and now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            total = max(total, done)  # it may be an estimate
            eta = duration((total - done) / rate) if rate > 0 else "unknown"
            self.say(f"{done} / {total} images, {rate:.1f} img/s, failed {failed}, ETA {eta}, limit: {limit}{cost}")

    def stop(self) -> None:
        """End the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def counted(number: int, what: str) -> str:
    """A number of things as a person says it: 1 worker, 2 workers."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def counts_table(counts: Sequence[Counts]) -> Table:
    """Counts by model for the terminal."""
    table = Table(box=None, pad_edge=False)
    for column in ("model", "version", "expected", "ok", "failed", "pending"):
        table.add_column(column, justify="left" if column in ("model", "version") else "right")
    for count in counts:
        about = "about " if count.estimated else ""
        table.add_row(
            count.model,
            count.model_version,
            f"{about}{count.expected}",
            str(count.ok),
            str(count.failed),
            f"{about}{count.pending}",
        )
    return table


def progress_lines(progress: Mapping[str, Any] | None) -> list[str]:
    """What limits a run and what it costs, from what its run.json or progress file says of it (Run.observed), which may
    be of another version."""
    if progress is None:
        return []
    accelerator, cost = progress.get("accelerator"), progress.get("cost")
    lines = []
    if isinstance(accelerator, Mapping) and accelerator.get("bound") != "start-up" and "sentence" in accelerator:
        lines.append(str(accelerator["sentence"]))
    if isinstance(cost, Mapping):
        # A bill of other fields is not one of ours.
        with contextlib.suppress(TypeError, ValueError):
            lines.append(Bill(**cost).sentence())
    return lines
