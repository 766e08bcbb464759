"""From a plan to the batches of one worker: read, decode, augment, in the epoch's order and a few batches ahead.

An image that cannot be read or has no fitting target leaves its place empty and is listed; it moves no other image.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.errors import RowError, UnreadableError
from pipeline.images import decode_image
from pipeline.sources.base import AllBut, Sample, Source, UnitEnd, read_unit
from pipeline.stages.stream import map_ordered, read_ahead
from pipeline.training.augment import AugmentOptions, Example, augment
from pipeline.training.order import EpochOrder, Group, own_places, part_range
from pipeline.training.plan import SourcePlan
from pipeline.training.task_targets import TaskTargets

__all__ = ["Failure", "Item", "SampleReader", "StepItems"]

DECODED_BYTES = 1_000_000_000
MESSAGE_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Failure:
    """An image that is not learned from (or not scored), and why."""

    image_id: str
    error_type: str
    message: str

    @classmethod
    def of(cls, image_id: str, error: Exception) -> "Failure":
        return cls(image_id, type(error).__name__, str(error)[:MESSAGE_CHARACTERS])


@dataclass(frozen=True, slots=True)
class Item:
    """What stands at one place of the epoch: an example, or why there is none."""

    image_id: str
    example: Example | None = None
    failure: Failure | None = None

    @property
    def size_bytes(self) -> int:
        return sum(values.nbytes for values in self.example.values()) if self.example else 0


@dataclass(frozen=True, slots=True)
class StepItems:
    """One worker's share of one batch. step: counted from the epoch's first."""

    step: int
    items: tuple[Item, ...]


class SampleReader:
    """Reads the images of a plan for training.

    seed: of the augmentation. max_pixels: larger images fail. threads: that decode and augment.
    """

    def __init__(
        self,
        source: Source,
        plan: SourcePlan,
        targets: TaskTargets,
        options: AugmentOptions,
        *,
        seed: int,
        max_pixels: int,
        threads: int,
    ) -> None:
        self.plan = plan
        self._source = source
        self._targets = targets
        self._options = options
        self._seed = seed
        self._max_pixels = max_pixels
        self._threads = threads

    def steps(
        self,
        order: EpochOrder,
        *,
        epoch: int,
        batch_images: int,
        first_step: int = 0,
        worker: int = 0,
        workers: int = 1,
    ) -> Iterator[StepItems]:
        """The worker's share of every batch from `first_step` on, an empty one too.

        Encoded images of the group that is learned from and of the next one are held in memory.
        """
        groups = read_ahead(
            self._groups(order, batch_images, first_step, worker, workers), count=1, weight=len, limit=1
        )
        with (
            ThreadPoolExecutor(self._threads, "maskmill-decode", torch.set_num_threads, (1,)) as pool,
        ):
            items = map_ordered(
                pool,
                lambda sample: self._item(sample, epoch),
                itertools.chain.from_iterable(groups),
                count=max(2 * self._threads, 2 * -(-batch_images // workers)),
                weight=lambda item: item.size_bytes,
                limit=DECODED_BYTES,
            )
            for step in range(first_step, order.steps(batch_images)):
                size = min(batch_images, order.images - step * batch_images)
                share = len(part_range(size, worker, workers))
                yield StepItems(step, tuple(itertools.islice(items, share)))

    def _groups(
        self, order: EpochOrder, batch_images: int, first_step: int, worker: int, workers: int
    ) -> Iterator[list[Sample]]:
        """The worker's samples of each group, in the epoch's order."""
        with ThreadPoolExecutor(self._threads, "maskmill-units") as pool:
            for group in order.groups(first_step * batch_images):
                own_N = own_places(group, order.images, batch_images, worker, workers, first_step)
                wanted = _by_unit(group, own_N)
                found: dict[tuple[int, int], Sample] = {}
                for samples in pool.map(lambda pair: self._unit(*pair), wanted.items()):
                    found |= samples
                places = zip(group.unit_N[own_N].tolist(), group.position_N[own_N].tolist(), strict=True)
                yield [found[place] for place in places]

    def _unit(self, index: int, wanted: set[int]) -> dict[tuple[int, int], Sample]:
        """The wanted samples of one unit; where it ends early, the rest of them as failed ones."""
        unit = self.plan.units[index]
        found: dict[tuple[int, int], Sample] = {}
        error: RowError = UnreadableError(f"{unit.shard_id} has fewer images than were planned")
        for item in read_unit(self._source, unit, AllBut(wanted, self.plan.rows[index])):
            if isinstance(item, UnitEnd):
                break
            if item.position in wanted:
                found[index, item.position] = item
            error = item.error or error
        for position in wanted:
            if (index, position) not in found:
                found[index, position] = Sample(
                    image_id=f"{unit.shard_id}/!{position}",
                    shard_id=unit.shard_id,
                    position=position,
                    image=b"",
                    error=error,
                )
        return found

    def _item(self, sample: Sample, epoch: int) -> Item:
        try:
            if sample.error is not None:
                raise sample.error
            image_HWC = decode_image(sample.image, max_pixels=self._max_pixels)
            example = self._targets.example(image_HWC, sample.targets)
        except RowError as error:
            return Item(sample.image_id, failure=Failure.of(sample.image_id, error))
        changed = augment(example, self._options, seed=self._seed, epoch=epoch, image_id=sample.image_id)
        return Item(sample.image_id, example=changed)


def _by_unit(group: Group, own_N: Any) -> dict[int, set[int]]:
    wanted: dict[int, set[int]] = {}
    for unit, position in zip(group.unit_N[own_N].tolist(), group.position_N[own_N].tolist(), strict=True):
        wanted.setdefault(unit, set()).add(position)
    return wanted
