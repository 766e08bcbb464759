"""Batches: every item once, in order, of one shape, within the budget."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from pipeline.stages.batching import PixelBatcher


@dataclass(frozen=True)
class Item:
    padded: tuple[int, int]
    index: int


ITEMS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=40).map(
    lambda shapes: [Item(shape, index) for index, shape in enumerate(shapes)]
)


def batches(items: list[Item], budget: int) -> list[list[Item]]:
    batcher = PixelBatcher[Item](lambda: budget)
    full = [batch for batch in map(batcher.add, items) if batch]
    return full + batcher.flush()


@given(ITEMS, st.integers(1, 60))
def test_batches_partition_the_items(items: list[Item], budget: int) -> None:
    result = batches(items, budget)
    assert sorted(item.index for batch in result for item in batch) == list(range(len(items)))
    for batch in result:
        assert len({item.padded for item in batch}) == 1
        assert [item.index for item in batch] == sorted(item.index for item in batch)
        height, width = batch[0].padded
        assert len(batch) == 1 or len(batch) * height * width <= budget


@given(ITEMS, st.integers(1, 60))
def test_a_batch_that_leaves_early_is_full(items: list[Item], budget: int) -> None:
    batcher = PixelBatcher[Item](lambda: budget)
    for batch in filter(None, map(batcher.add, items)):
        height, width = batch[0].padded
        assert (len(batch) + 1) * height * width > budget


@given(ITEMS, st.integers(1, 60))
def test_the_same_items_make_the_same_batches(items: list[Item], budget: int) -> None:
    assert batches(items, budget) == batches(items, budget)


def test_by_hand() -> None:
    items = [Item((2, 2), 0), Item((1, 1), 1), Item((2, 2), 2), Item((2, 2), 3), Item((9, 9), 4)]
    batcher = PixelBatcher[Item](lambda: 8)
    assert [batcher.add(item) for item in items] == [None, None, [items[0], items[2]], None, [items[4]]]
    assert batcher.flush() == [[items[1]], [items[3]]]
    assert batcher.flush() == []


def test_a_smaller_budget_counts_from_the_next_item_on() -> None:
    budget = 100
    batcher = PixelBatcher[Item](lambda: budget)
    items = [Item((2, 2), index) for index in range(4)]
    assert batcher.add(items[0]) is None
    budget = 4
    assert batcher.add(items[1]) == items[:2]
    assert batcher.add(items[2]) == [items[2]]
