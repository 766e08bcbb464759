"""Batch budgets tried from one image up: seconds and memory of each, until memory ends or nothing is gained."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.errors import PredictError, RowError
from pipeline.models.load import LoadedModel
from pipeline.preflight.memory import free_bytes, peak_bytes, reset_peak
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import Prepared

__all__ = ["Point", "Trial", "best_budget", "ladder", "seconds_at", "trial"]

# Two steps in a row that gain less than this end the trial, and the smallest budget within it of the best is proposed.
GAIN = 0.03
# A point that takes longer is not timed again.
LONG_S = 2.0
# The next budget must leave so much of what is free.
HEADROOM = 0.3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One budget. images: of the batch that it makes. peak_bytes: of the process.

    accelerator_bytes: of its memory, where there is one.
    problem: "out of memory", where smaller batches had to be made of it.
    """

    budget_pixels: int
    images: int
    seconds_per_image: float
    peak_bytes: int
    accelerator_bytes: int | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One model on one device. padded: (height, width) of the most common input. ended: why no larger budget was tried.

    first_s: the first forward pass, with whatever is set up in it.
    """

    label: str
    padded: tuple[int, int]
    first_s: float
    points: tuple[Point, ...]
    ended: str


def ladder(smallest: int, own: int, largest: int) -> list[int]:
    """Budgets in pixels: doublings from one image on, and the config's own among them, up to `largest`."""
    budgets = {max(smallest, min(own, largest))}
    budget = smallest
    while budget <= largest:
        budgets.add(budget)
        budget *= 2
    return sorted(budgets)


def trial(
    model: LoadedModel,
    prepared: Sequence[Prepared],
    *,
    device: torch.device,
    own_pixels: int,
    base_pixels: int,
    tile_pixels: int,
    most_images: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Trial:
    """Time batches of the most common shape among `prepared` (one or more).

    own_pixels: the config's budget. base_pixels: the smallest budget worth trying, one image of the largest common
    shape of all models. most_images: of one batch. seconds: after which no further budget is tried. Raises RunError,
    and PredictError where the model predicts nothing at all.
    """
    (padded, _), *_ = Counter(item.padded for item in prepared).most_common(1)
    alike = [item for item in prepared if item.padded == padded]
    pixels = padded[0] * padded[1]
    predict = Predict(model, device=device, batch_pixels=own_pixels, tile_pixels=tile_pixels)
    began = clock()
    predict.check()
    outcome = predict(alike[:1])[0]
    if isinstance(outcome, RowError):
        raise PredictError(f"model {model.label}: {type(outcome).__name__}: {outcome}")
    first_s = clock() - began

    points: list[Point] = []
    ended, stale, resting = "the largest batch of a file", 0, _resident(device)
    for budget in ladder(base_pixels, own_pixels, max(base_pixels, most_images * pixels)):
        count = max(1, min(budget // pixels, most_images))
        if points and points[-1].images == count:
            points.append(replace(points[-1], budget_pixels=budget))
            continue
        if points:
            # Memory grows with the images of a batch; what one more step would take is known from the last.
            wanted = (_used(points[-1]) - resting) * count / points[-1].images
            if wanted - (_used(points[-1]) - resting) > (1 - HEADROOM) * free_bytes(device):
                ended = "memory"
                break
            if clock() - began + points[-1].seconds_per_image * count > seconds:
                ended = "time"
                break
        batch = [alike[index % len(alike)] for index in range(count)]
        point = _timed(predict, batch, budget, device, clock)
        points.append(point)
        if point.problem:
            ended = "memory"
            break
        best = min(item.seconds_per_image for item in points[:-1]) if points[:-1] else None
        gains = best is None or point.seconds_per_image < best * (1 - GAIN)
        stale = 0 if gains else stale + 1
        if stale >= 2 and budget >= own_pixels:
            ended = "no gain"
            break
    return Trial(label=model.label, padded=padded, first_s=first_s, points=tuple(points), ended=ended)


def _timed(
    predict: Predict, batch: list[Prepared], budget: int, device: torch.device, clock: Callable[[], float]
) -> Point:
    reset_peak(device)
    predict.batch_pixels = before = budget
    best = float("inf")
    for _ in range(3):
        started = clock()
        predict(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock() - started)
        if best > LONG_S:
            break
    resident, accelerator = peak_bytes(device)
    return Point(
        budget_pixels=budget,
        images=len(batch),
        seconds_per_image=best / len(batch),
        peak_bytes=resident,
        accelerator_bytes=accelerator,
        # Predict makes its budget smaller when it runs out of memory.
        problem="out of memory" if predict.batch_pixels < before else None,
    )


def _resident(device: torch.device) -> int:
    reset_peak(device)
    resident, accelerator = peak_bytes(device)
    return resident if accelerator is None else accelerator


def _used(point: Point) -> int:
    return point.peak_bytes if point.accelerator_bytes is None else point.accelerator_bytes


def seconds_at(found: Trial, budget_pixels: int) -> float | None:
    """Seconds per image under a budget; None where it is over what memory allowed.

    Beyond a trial that ended for another reason its largest budget counts.
    """
    fitting = [point for point in found.points if not point.problem and point.budget_pixels <= budget_pixels]
    if found.ended == "memory" and budget_pixels > max(
        (point.budget_pixels for point in found.points if not point.problem), default=0
    ):
        return None
    return fitting[-1].seconds_per_image if fitting else None


def best_budget(trials: Sequence[Trial]) -> int | None:
    """The smallest budget within 3 % of the best for all models together: they share one. None without any."""
    budgets = sorted({point.budget_pixels for found in trials for point in found.points})
    together: dict[int, float] = {}
    for budget in budgets:
        each = [seconds_at(found, budget) for found in trials]
        if not any(value is None for value in each):
            together[budget] = sum(value for value in each if value is not None)
    if not together:
        return None
    fastest = min(together.values())
    return next(budget for budget, value in together.items() if value <= fastest * (1 + GAIN))
