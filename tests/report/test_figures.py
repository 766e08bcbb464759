"""Figures of single images equal the figures of a state that holds this image alone."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_helpers import SPACE, detection_scores, mixed_rows, semantic_score

from pipeline.errors import SchemaError
from pipeline.metrics.confusion import ClassCounts, Confusion
from pipeline.metrics.depth import Depth
from pipeline.metrics.detection import Detection
from pipeline.metrics.panoptic import PanopticState
from pipeline.metrics.score import SCORE
from pipeline.report.figures import COUNTS, IMAGE_FIGURES, image_figures


def alone(score: dict[str, Any] | None) -> dict[str, float]:
    """From the states' own compute, one image at a time."""
    found = {}
    score = score or {}
    if score.get("confusion"):
        figures = Confusion.from_row(score["confusion"]).compute()
        found |= {f"semantic.{name}": figures[name] for name in ("mIoU", "pixel_accuracy")}
    if score.get("panoptic"):
        found["panoptic.PQ"] = PanopticState.from_row(score["panoptic"]).compute(SPACE)["All"]["PQ"]
    for kind in ("bbox", "segm"):
        if score.get(kind):
            ((tp, fp, fn),) = Detection.from_row(score[kind]).image_counts().tolist()
            found |= {f"detection.{kind}.{name}": value for name, value in (("tp", tp), ("fp", fp), ("fn", fn))}
            found[f"detection.{kind}.F1"] = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else math.nan
    if score.get("depth"):
        figures = Depth.from_row(score["depth"]).compute()
        found |= {f"depth.{name}": figures[name] for name in ("AbsRel", "RMSE", "delta1")}
    return found


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_one_state_for_each_image(seed: int) -> None:
    scores = [row["score"] for row in mixed_rows(seed, 25)]
    column = pa.array([*scores, None], SCORE)
    for part in (column, column[3:11], column[:0]):
        figures = image_figures(part)
        assert sorted(figures) == sorted([*(figure.name for figure in IMAGE_FIGURES), *COUNTS])
        for name, values in figures.items():
            expected = [alone(score).get(name, math.nan) for score in part.to_pylist()]
            assert values.tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True), name


def test_images_without_evidence() -> None:
    void = Confusion.from_maps(np.full((2, 2), 255), np.full((2, 2), 1), SPACE)
    nothing = {"classes": ClassCounts.empty().to_row(), "panoptic": PanopticState.empty().to_row()}
    unseen = Depth.from_image(np.ones((2, 2)), np.full((2, 2), np.nan)).to_row()
    column = pa.array([nothing | {"confusion": void.to_row(), "depth": unseen}], SCORE)
    assert all(np.isnan(values).all() for values in image_figures(column).values())


def test_no_figure_hangs_on_the_rows_around_it() -> None:
    scores = [semantic_score(seed) for seed in range(30)]
    whole = image_figures(pa.array(scores, SCORE))
    for at in (0, 7, 29):
        single = image_figures(pa.array([scores[at]], SCORE))
        assert all(single[name][0].tobytes() == whole[name][at].tobytes() for name in whole)


def test_records_of_several_images_in_a_row() -> None:
    states = [Detection.from_row(score["bbox"]) for score in detection_scores(1, 3)]
    column = pa.array([{"bbox": states[0].merge(states[1]).to_row()}, {"bbox": states[2].to_row()}], SCORE)
    with pytest.raises(SchemaError, match="of one image in each row"):
        image_figures(column)
