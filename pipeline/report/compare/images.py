"""How single images differ between two runs: how many got better or worse, by how much, and which changed most."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.report.bootstrap import Hashes, hash_images
from pipeline.report.compare.pairs import find
from pipeline.report.figures import IMAGE_FIGURES, ImageFigure
from pipeline.report.notable import Extremes

__all__ = ["CHANGES", "ImageChanges"]

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

# Of each figure: its value in A and in B, and B - A; null where the image has none.
VALUES = ("a", "b", "difference")
CHANGES = pa.schema(
    [
        ("image_id", pa.string()),
        ("shard_id", pa.string()),
        ("position", pa.int32()),
        *((f"{figure.name.replace('.', '_')}_{value}", pa.float64()) for figure in IMAGE_FIGURES for value in VALUES),
    ]
)
# Of a histogram of differences. The two per cent of the images that differ most may lie beyond it.
BINS = 40
INSIDE = 98.0


class ImageChanges:
    """IMAGE_FIGURES of the images that both runs have, 16 bytes for each that occurs. First all of A, then all of B."""

    def __init__(self, common: Hashes, images: int) -> None:
        """common: the images, ascending. images: how many of those that changed most are kept in each direction."""
        self._common = common
        self._values: dict[str, dict[str, Floats]] = {"a": {}, "b": {}}
        self._extremes = {figure.name: Extremes(figure, images) for figure in IMAGE_FIGURES}

    def add_a(self, place_N: Places, figures: Mapping[str, Floats]) -> None:
        """Add images of A. place_N: which of `common` each is. figures: `image_figures` of their scores."""
        self._keep("a", place_N, figures)

    def add_b(self, place_N: Places, figures: Mapping[str, Floats], rows: pa.RecordBatch) -> pa.Table:
        """Add images of B, once all of A were added. rows: theirs. Returns them as CHANGES."""
        self._keep("b", place_N, figures)
        columns: dict[str, pa.Array] = {name: rows[name] for name in ("image_id", "shard_id", "position")}
        for figure in IMAGE_FIGURES:
            known = self._values["a"].get(figure.name)
            b = figures[figure.name]
            a = np.full(len(b), np.nan) if known is None else known[place_N]
            self._extremes[figure.name].add(b - a, rows)
            for value, values in zip(VALUES, (a, b, b - a), strict=True):
                columns[f"{figure.name.replace('.', '_')}_{value}"] = pa.array(values, from_pandas=True)
        return pa.table(columns).cast(CHANGES)

    def _keep(self, side: str, place_N: Places, figures: Mapping[str, Floats]) -> None:
        known = self._values[side]
        for figure in IMAGE_FIGURES:
            values = figures[figure.name]
            if np.isnan(values).all():
                continue
            if figure.name not in known:
                known[figure.name] = np.full(len(self._common), np.nan)
            known[figure.name][place_N] = values

    def compute(self) -> dict[str, dict[str, Any]]:
        """By figure, those that some image has in both runs: images, better, worse, equal, only_a, only_b (images with
        evidence in one run alone), mean_change, median_change, histogram, improved, regressed."""
        return {
            figure.name: self._compute(figure)
            for figure in IMAGE_FIGURES
            if self._values["a"].keys() & self._values["b"].keys() & {figure.name}
        }

    def _compute(self, figure: ImageFigure) -> dict[str, Any]:
        a, b = (self._values[side][figure.name] for side in ("a", "b"))
        both = ~np.isnan(a) & ~np.isnan(b)
        # In the order of the hashes, which no order or cut of the rows changes.
        change = (b - a)[both]
        rise, fall = int(np.count_nonzero(change > 0)), int(np.count_nonzero(change < 0))
        better, worse = (rise, fall) if figure.rising else (fall, rise)
        extremes = self._extremes[figure.name]
        return {
            "images": len(change),
            "better": better,
            "worse": worse,
            "equal": len(change) - rise - fall,
            "only_a": int(np.count_nonzero(~np.isnan(a))) - len(change),
            "only_b": int(np.count_nonzero(~np.isnan(b))) - len(change),
            "mean_change": float(change.mean()) if len(change) else None,
            "median_change": float(np.median(change)) if len(change) else None,
            "histogram": _histogram(change),
            "improved": self._listed(figure, extremes.best(), 1),
            "regressed": self._listed(figure, extremes.worst(), -1),
        }

    def _listed(self, figure: ImageFigure, found: list[dict[str, Any]], sign: int) -> list[dict[str, Any]]:
        """Those that really changed that way, with both values."""
        sign = sign if figure.rising else -sign
        kept = [entry for entry in found if entry["value"] * sign > 0]
        place, _ = find(self._common, hash_images(entry["image_id"] for entry in kept))
        a, b = (self._values[side][figure.name][place].tolist() for side in ("a", "b"))
        return [
            {name: entry[name] for name in ("image_id", "shard_id", "position")}
            | {"a": a[at], "b": b[at], "difference": entry["value"]}
            for at, entry in enumerate(kept)
        ]


def _histogram(change: Floats) -> dict[str, Any] | None:
    """Of the images that changed: {edges (41, around 0), counts (40), below, above}; None where none did."""
    change = change[change != 0]
    if not len(change):
        return None
    reach = float(np.percentile(np.abs(change), INSIDE))
    edges = np.linspace(-reach, reach, BINS + 1)
    edges[BINS // 2] = 0.0
    return {
        "edges": edges.tolist(),
        "counts": np.histogram(change, edges)[0].tolist(),
        "below": int(np.count_nonzero(change < edges[0])),
        "above": int(np.count_nonzero(change > edges[-1])),
    }
