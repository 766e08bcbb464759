"""Rows, classes and maps as the page gets them: numbers that JSON has, and text of the data only as people may read it.

What says whose row it is (model, version, shard, position) stays as it is, because it comes back in the next question.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import SchemaError
from pipeline.printable import printable
from pipeline.report.figures import IMAGE_FIGURES, image_figures
from pipeline.schema import MODEL
from pipeline.taxonomy import Category
from pipeline.viewer.maps import PixelMap
from pipeline.viewer.query import QUALITY

__all__ = ["MAX_VALUE", "shown_class", "shown_map", "shown_row", "stored_figures"]

MOST_CLASSES = 6
MAX_VALUE = 300


def shown_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for the page: text that people read is printable, what says whose row it is stays as it is."""
    quality = row.get("quality") or {}
    shown = {name: _number(quality.get(column)) for name, column in QUALITY.items()}
    more: dict[str, Any] = {name: row[name] for name in ("figures", "labeled_at", "value") if name in row}
    if "fields" in row:
        more["fields"] = [
            [printable(name[:MAX_VALUE]), printable(value[:MAX_VALUE])] for name, value in row["fields"].items()
        ]
        more["run"] = printable(str(row["run_id"] or ""))
    return {
        **shown,
        **more,
        "model": row[MODEL],
        "version": row["model_version"],
        "shard": row["shard_id"],
        "position": row["position"],
        "image": printable(str(row["image_id"])),
        "shownModel": printable(row[MODEL]),
        "shownShard": printable(row["shard_id"]),
        "width": row["width"],
        "height": row["height"],
        "status": printable(str(row["status"])),
        "error": [printable(row[f"error_{name}"]) for name in ("type", "stage", "message")],
        "attempts": row.get("attempts"),
        "kind": row["kind"],
        "objects": row["objects"],
        "best": _number(row["best_score"]),
        "classes": row["classes"][:MOST_CLASSES],
    }


def stored_figures(more: pa.Table) -> dict[str, float]:
    """The row's figures where it was scored."""
    if "score" not in more.column_names or not len(more) or not more.column("score")[0].is_valid:
        return {}
    try:
        figures = image_figures(more.column("score").combine_chunks())
    except (SchemaError, KeyError, ValueError):
        return {}
    return {one.name: float(figures[one.name][0]) for one in IMAGE_FIGURES if np.isfinite(figures[one.name][0])}


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def shown_class(category: Category) -> dict[str, Any]:
    return {"id": category.id, "name": printable(category.name), "color": category.color}


def shown_map(found: PixelMap) -> PixelMap:
    for entry in found.header.get("entries", ()):
        entry["name"] = printable(entry["name"])
    return found
