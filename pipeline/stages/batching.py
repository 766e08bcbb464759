"""Batches by padded shape and pixel budget instead of by row count."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

__all__ = ["PixelBatcher", "Shaped"]


class Shaped(Protocol):
    @property
    def padded(self) -> tuple[int, int]: ...


Item = TypeVar("Item", bound=Shaped)


class PixelBatcher(Generic[Item]):
    """Groups items of one padded (height, width); a group leaves when the next item would break the budget.

    Which items share a batch depends only on their order and the budget, so a rerun makes the same batches.
    """

    def __init__(self, budget_pixels: Callable[[], int]) -> None:
        self._budget_pixels = budget_pixels
        self._groups: dict[tuple[int, int], list[Item]] = {}

    def add(self, item: Item) -> list[Item] | None:
        """Take one item; give the batch that is full with it, if any."""
        group = self._groups.setdefault(item.padded, [])
        group.append(item)
        height, width = item.padded
        if (len(group) + 1) * height * width > self._budget_pixels():
            return self._groups.pop(item.padded)
        return None

    def flush(self) -> list[list[Item]]:
        """All that is left, oldest group first."""
        groups, self._groups = list(self._groups.values()), {}
        return groups
