"""Samples and items as Arrow rows, on their way between the processes that read, prepare and learn."""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import safetensors.torch

from pipeline import errors
from pipeline.sources.base import Sample
from pipeline.training.samples import Failure, Item

__all__ = ["items_to_table", "samples_to_table", "table_to_items", "table_to_samples"]

SAMPLES = pa.schema(
    [
        ("image_id", pa.string()),
        ("shard_id", pa.string()),
        ("position", pa.int64()),
        ("image", pa.large_binary()),
        ("targets", pa.map_(pa.string(), pa.large_binary())),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
    ]
)
ITEMS = pa.schema(
    [
        ("image_id", pa.string()),
        ("example", pa.large_binary()),
        ("error_type", pa.string()),
        ("message", pa.string()),
    ]
)


def samples_to_table(samples: Iterable[Sample]) -> pa.Table:
    """Encoded samples as rows; `fields` stay behind, training reads none."""
    rows = [
        {
            "image_id": sample.image_id,
            "shard_id": sample.shard_id,
            "position": sample.position,
            "image": sample.image,
            "targets": list(sample.targets.items()),
            "error_type": type(sample.error).__name__ if sample.error else None,
            "error_message": str(sample.error) if sample.error else None,
        }
        for sample in samples
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def table_to_samples(table: pa.Table) -> Iterator[Sample]:
    """The inverse of `samples_to_table`."""
    for row in table.to_pylist():
        kind, message = row.pop("error_type"), row.pop("error_message")
        error = getattr(errors, kind)(message) if kind else None
        yield Sample(**{**row, "targets": dict(row["targets"])}, error=error)


def items_to_table(items: Iterable[Item]) -> pa.Table:
    """Items as rows; an example is a safetensors file of its tensors."""
    return pa.Table.from_pylist([_row(item) for item in items], schema=ITEMS)


def _row(item: Item) -> dict[str, Any]:
    example, failure = item.example, item.failure
    tensors = example and {name: values.contiguous() for name, values in example.items()}
    return {
        "image_id": item.image_id,
        "example": None if tensors is None else safetensors.torch.save(tensors),
        "error_type": failure and failure.error_type,
        "message": failure and failure.message,
    }


def table_to_items(table: pa.Table) -> Iterator[Item]:
    """The inverse of `items_to_table`; an example's tensors are plain ones."""
    for row in table.to_pylist():
        name = row["image_id"]
        if row["example"] is None:
            yield Item(name, failure=Failure(name, row["error_type"], row["message"]))
        else:
            yield Item(name, example=safetensors.torch.load(row["example"]))
