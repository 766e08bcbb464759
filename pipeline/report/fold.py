"""One pass over the rows of a report: counts, problems, states, replicates, distributions and the extreme images."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.metrics.detection import Detection
from pipeline.report.bootstrap import LEVEL, interval
from pipeline.report.figures import COUNTS, IMAGE_FIGURES, image_figures
from pipeline.report.histograms import LogHistogram, ShareHistogram
from pipeline.report.notable import Extremes, Problems
from pipeline.report.replicates import Replicates, detection_replicates
from pipeline.report.rows import OUTCOMES
from pipeline.report.slices import Slices
from pipeline.report.states import States
from pipeline.taxonomy import Taxonomy

__all__ = ["METHOD", "Fold"]

Floats = npt.NDArray[np.float64]

METHOD = "Poisson weights of each image, percentiles of the replicates"


class Fold:
    """What a report says of the blocks that were added, whatever their order and cut.

    slices: what to group by. images: how many worst and best images are kept. replicates: of the
    bootstrap, 0 for none.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        *,
        slices: Sequence[Slices] = (),
        images: int = 8,
        replicates: int = 1000,
        seed: int = 0,
    ) -> None:
        self._slices = slices
        self._bootstrap: dict[str, Any] = {"replicates": replicates, "level": LEVEL, "method": METHOD, "seed": seed}
        self._replicates = Replicates(taxonomy, replicates, seed) if replicates else None
        self._states = States(taxonomy, confusion=True)
        self._counts: Counter[str] = Counter()
        self._problems = Problems()
        self._sizes = LogHistogram()
        self._extremes = {figure.name: Extremes(figure, images) for figure in IMAGE_FIGURES}
        self._histograms = {
            figure.name: ShareHistogram() if figure.share else LogHistogram() for figure in IMAGE_FIGURES
        }

    def add(self, block: pa.RecordBatch) -> dict[str, Floats]:
        """Add a block as `ScoredTable.blocks` gives it. Returns figures of each of its images by name, NaN where it has
        none. Raises SchemaError for scores that do not fit together."""
        is_ok = pc.equal(block["outcome"], "ok")
        self._counts.update(block["outcome"].to_pylist())
        self._problems.add(block.filter(pc.invert(is_ok)))
        self._sizes.add(_megapixels(block))
        for slices in self._slices:
            slices.add(block)
        ok = block.filter(is_ok)
        self._states.add(ok["score"])
        if self._replicates is not None:
            self._replicates.add(ok["image_id"].to_pylist(), ok["score"])
        figures = image_figures(ok["score"])
        for figure in IMAGE_FIGURES:
            self._histograms[figure.name].add(figures[figure.name])
            self._extremes[figure.name].add(figures[figure.name], ok)
        rows = np.flatnonzero(is_ok.to_numpy(zero_copy_only=False))
        return {name: _spread(figures[name], rows, len(block)) for name in (*(f.name for f in IMAGE_FIGURES), *COUNTS)}

    def report(self) -> dict[str, Any]:
        """Counts, problems, sections, intervals, sizes, image_figures, worst, best, slices (several: a list)."""
        detections = self._states.detections()
        histograms = {name: histogram.compute() for name, histogram in self._histograms.items()}
        sizes = self._sizes.compute()
        extremes = {name: extreme for name, extreme in self._extremes.items() if histograms[name]}
        report = {
            "counts": {"images": self._counts.total(), **{name: self._counts[name] for name in OUTCOMES}},
            "problems": self._problems.compute(),
            **self._states.sections(detections),
            **self._intervals(detections),
            **({"sizes": sizes | {"unit": "megapixels"}} if sizes else {}),
            "image_figures": {name: histogram for name, histogram in histograms.items() if histogram},
            "worst": {name: extreme.worst() for name, extreme in extremes.items()},
            "best": {name: extreme.best() for name, extreme in extremes.items()},
        }
        slices = [part.compute() for part in self._slices]
        return report | ({"slices": slices if len(slices) > 1 else slices[0]} if slices else {})

    def _intervals(self, detections: Mapping[str, Detection]) -> dict[str, Any]:
        """The interval of each figure by its path in the report, and how they came about. One image has no spread."""
        if self._replicates is None or self._counts["ok"] < 2:
            return {"intervals": {}, "bootstrap": self._bootstrap}
        found = {path: interval(values) for path, values in self._replicates.values(detections).items()}
        bootstrap = dict(self._bootstrap)
        for name, state in detections.items():
            replicates = detection_replicates(len(state.score), bootstrap["replicates"])
            if replicates < bootstrap["replicates"]:
                bootstrap.setdefault("replicates_of", {})[f"detection.{name}"] = replicates
        return {"intervals": {path: bounds for path, bounds in found.items() if bounds}, "bootstrap": bootstrap}


def _spread(values: Floats, rows: npt.NDArray[np.intp], size: int) -> Floats:
    spread = np.full(size, np.nan)
    spread[rows] = values
    return spread


def _megapixels(block: pa.RecordBatch) -> Floats:
    """Of the images whose size is known."""
    width, height = (block[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in ("width", "height"))
    megapixels: Floats = width * height / 1e6
    return megapixels
