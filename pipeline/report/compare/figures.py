"""The difference of two runs in each figure and each class, with its paired interval and what it means."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.report.bootstrap import interval
from pipeline.report.cells import figure_value
from pipeline.report.formats import figure_format
from pipeline.report.terminal import CLASS_FIGURES, FIGURES
from pipeline.taxonomy import Taxonomy

__all__ = ["class_differences", "class_rows", "differences"]

Floats = npt.NDArray[np.float64]
Tree = Mapping[str, Any]
Replicated = Mapping[str, Floats]


def differences(a: Tree, b: Tree, replicates_a: Replicated, replicates_b: Replicated) -> dict[str, dict[str, Any]]:
    """By the path of each figure that both have: a, b, difference (b - a), interval, excludes_zero, change.

    a, b: sections of a report. replicates_*: (B,) of each figure, replicate for replicate of the same images; of one
    that has fewer of them the first count. change: better or worse where the interval excludes 0, equal where
    difference and interval are 0, else unclear; None without an interval.
    """
    found = {}
    for path in FIGURES:
        value_a, value_b = figure_value(a, path), figure_value(b, path)
        if value_a is None or value_b is None:
            continue
        bounds = None
        if path in replicates_a and path in replicates_b:
            bounds = interval(_paired(replicates_a[path], replicates_b[path]))
        found[path] = _difference(value_a, value_b, bounds, lower=figure_format(path).lower)
    return found


def _paired(a_B: Floats, b_B: Floats) -> Floats:
    size = min(len(a_B), len(b_B))
    return b_B[:size] - a_B[:size]


def _difference(a: float, b: float, bounds: list[float] | None, *, lower: bool) -> dict[str, Any]:
    excludes = None if bounds is None else bounds[0] > 0 or bounds[1] < 0
    change = None
    if bounds is not None:
        same = b == a and bounds == [0.0, 0.0]
        change = "equal" if same else "unclear" if not excludes else "better" if (b < a) == lower else "worse"
    return {"a": a, "b": b, "difference": b - a, "interval": bounds, "excludes_zero": excludes, "change": change}


def class_differences(
    a: Tree, b: Tree, replicates_a: Replicated, replicates_b: Replicated
) -> dict[str, dict[str, dict[str, Any]]]:
    """By the path of each figure of classes that both have, then by category id: name, and what `differences` has.

    A class without evidence in a run is None there, and so is its difference. replicates_*: (B, K), the categories
    ascending by id.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in CLASS_FIGURES:
        rows_a, rows_b = _per_class(a, path), _per_class(b, path)
        bounds = _class_intervals(path, replicates_a, replicates_b)
        ids = sorted({*rows_a, *rows_b}, key=int) if rows_a and rows_b else []
        for place, identifier in enumerate(ids):
            row_a, row_b = rows_a.get(identifier, {}), rows_b.get(identifier, {})
            value_a, value_b = (figure_value(row, path.rpartition(".")[2]) for row in (row_a, row_b))
            found.setdefault(path, {})[identifier] = {
                "name": (row_a or row_b)["name"],
                **_class_difference(value_a, value_b, bounds[place] if bounds else None),
            }
    return found


def _per_class(sections: Tree, path: str) -> Mapping[str, Tree]:
    section: Any = sections
    for name in path.split(".")[:-1]:
        section = section.get(name, {})
    rows: Mapping[str, Tree] = section.get("per_class", {})
    return rows


def _class_intervals(path: str, a: Replicated, b: Replicated) -> list[list[float] | None]:
    """One for each category of the label space; none where the figure has no replicates."""
    if path not in a or path not in b:
        return []
    return [interval(difference_B) for difference_B in (b[path] - a[path]).T]


def _class_difference(a: float | None, b: float | None, bounds: list[float] | None) -> dict[str, Any]:
    if a is None or b is None:
        return {"a": a, "b": b} | dict.fromkeys(("difference", "interval", "excludes_zero", "change"))
    return _difference(a, b, bounds, lower=False)


def class_rows(per_class: Mapping[str, Mapping[str, Tree]], taxonomy: Taxonomy) -> list[dict[str, Any]]:
    """One row per class of the label space: category_id, name, kind, and of each figure a, b, difference, low, high,
    e.g. semantic_IoU_a and semantic_IoU_difference."""
    rows: list[dict[str, Any]] = [{"category_id": c.id, "name": c.name, "kind": c.kind} for c in taxonomy.categories]
    for path, classes in per_class.items():
        prefix = path.removeprefix("detection.").replace(".", "_")
        for row in rows:
            found = classes.get(str(row["category_id"]), {})
            low, high = found.get("interval") or (None, None)
            values = {name: found.get(name) for name in ("a", "b", "difference")} | {"low": low, "high": high}
            row |= {f"{prefix}_{name}": value for name, value in values.items()}
    return rows
