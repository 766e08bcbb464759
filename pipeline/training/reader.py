"""From a plan to the batches of one worker: the images of each group are read, then prepared, a few batches ahead.

An image that cannot be read or has no fitting target leaves its place empty and is listed; it moves no other image.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from pipeline.errors import RowError, UnreadableError
from pipeline.sources.base import AllBut, Sample, Source, UnitEnd, read_unit
from pipeline.stages.stream import map_ordered, read_ahead
from pipeline.training.order import EpochOrder, own_places, part_range
from pipeline.training.plan import SourcePlan
from pipeline.training.samples import Item, Preparation, StepItems

__all__ = ["GroupReader", "Share", "StepReader", "ThreadReader", "steps_of"]

DECODED_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which part of an epoch is read: the batches from `first_step` on, and of each the part of one of `workers`."""

    order: EpochOrder
    epoch: int
    batch_images: int
    first_step: int = 0
    worker: int = 0
    workers: int = 1

    @property
    def groups(self) -> range:
        """Numbers of the groups that the share is of."""
        return self.order.groups_from(self.first_step * self.batch_images)

    @property
    def batch_share(self) -> int:
        """Images of one batch, at most."""
        return -(-self.batch_images // self.workers)


class StepReader(Protocol):
    """What feeds the loop. Which images a step has is settled by the order; where they are read is not."""

    def steps(self, share: Share) -> Iterator[StepItems]:
        """The share of every batch, an empty one too."""
        ...


class GroupReader:
    """Reads encoded images with their targets. threads: units that are read at once."""

    def __init__(self, source: Source, plan: SourcePlan, *, threads: int) -> None:
        self.plan = plan
        self.threads = threads
        self._source = source

    def read(self, share: Share, number: int) -> list[Sample]:
        """The share's samples of a group of the epoch, in the epoch's order."""
        group = share.order.group(number)
        own_N = own_places(group, share.order.images, share.batch_images, share.worker, share.workers, share.first_step)
        places = [*zip(group.unit_N[own_N].tolist(), group.position_N[own_N].tolist(), strict=True)]
        wanted: dict[int, set[int]] = {}
        for unit, position in places:
            wanted.setdefault(unit, set()).add(position)
        found: dict[tuple[int, int], Sample] = {}
        with ThreadPoolExecutor(self.threads, "maskmill-units") as pool:
            for samples in pool.map(lambda pair: self._unit(*pair), wanted.items()):
                found |= samples
        return [found[place] for place in places]

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


class ThreadReader:
    """A StepReader in threads of the worker itself, as many to prepare as the reader has to read."""

    def __init__(self, reader: GroupReader, preparation: Preparation) -> None:
        self.reader = reader
        self.preparation = preparation

    def steps(self, share: Share) -> Iterator[StepItems]:
        """Encoded images of the group that is learned from and of the next one are held in memory."""
        threads = self.reader.threads
        groups = (self.reader.read(share, number) for number in share.groups)
        samples = read_ahead(groups, count=1, weight=len, limit=1)
        # Examples are small; a forward pass's threads are not to be shared with their making.
        with ThreadPoolExecutor(threads, "maskmill-decode", torch.set_num_threads, (1,)) as pool:
            items = map_ordered(
                pool,
                lambda sample: self.preparation.item(sample, share.epoch),
                itertools.chain.from_iterable(samples),
                count=max(2 * threads, 2 * share.batch_share),
                weight=lambda item: item.size_bytes,
                limit=DECODED_BYTES,
            )
            yield from steps_of(share, items)


def steps_of(share: Share, items: Iterator[Item]) -> Iterator[StepItems]:
    """The share's items, which come in order, cut into its steps."""
    order = share.order
    for step in range(share.first_step, order.steps(share.batch_images)):
        size = min(share.batch_images, order.images - step * share.batch_images)
        own = len(part_range(size, share.worker, share.workers))
        yield StepItems(step, tuple(itertools.islice(items, own)))
