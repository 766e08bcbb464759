"""Figures of single images, for a whole column of scores at once: what ranks images from worst to best."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SchemaError
from pipeline.metrics.classsums import flat_lists, ratio
from pipeline.metrics.confusion import ClassCounts
from pipeline.metrics.detection import Detection
from pipeline.metrics.panoptic import HIGH_BITS, LOW_BITS, PanopticState
from pipeline.metrics.score import SCORE

__all__ = ["COUNTS", "IMAGE_FIGURES", "ImageFigure", "depth_column", "detection_keys", "image_figures"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ImageFigure:
    """rising: larger is better. share: from 0 to 1."""

    name: str
    rising: bool = True
    share: bool = True


# mIoU: over the classes in the image's target or prediction. PQ: over the categories with evidence in the image.
# F1: 2 tp / (2 tp + fp + fn), all predictions, IoU 0.5. A figure without evidence is NaN.
IMAGE_FIGURES = (
    ImageFigure("semantic.mIoU"),
    ImageFigure("semantic.pixel_accuracy"),
    ImageFigure("panoptic.PQ"),
    ImageFigure("detection.bbox.F1"),
    ImageFigure("detection.segm.F1"),
    ImageFigure("depth.AbsRel", rising=False, share=False),
    ImageFigure("depth.RMSE", rising=False, share=False),
    ImageFigure("depth.delta1"),
)
# What F1 is made of, at IoU 0.5.
COUNTS = tuple(f"detection.{kind}.{count}" for kind in ("bbox", "segm") for count in ("tp", "fp", "fn"))


def image_figures(score: pa.StructArray) -> dict[str, Floats]:
    """IMAGE_FIGURES and COUNTS of a column of SCORE, (N,) each, NaN where a row has none. Raises SchemaError."""
    columns = dict(zip(SCORE.names, score.flatten(), strict=True))
    figures: dict[str, Floats] = {}
    figures |= _semantic(columns["classes"])
    figures |= _panoptic(columns["panoptic"])
    for kind in ("bbox", "segm"):
        figures |= _detection(columns[kind], kind)
    return figures | _depth(columns["depth"])


def _semantic(classes: pa.StructArray) -> dict[str, Floats]:
    row, _, sums = ClassCounts.entries(classes)
    intersection, target, pred = sums.T
    union = target + pred - intersection
    hits, pixels = np.bincount(row, intersection, len(classes)), np.bincount(row, target, len(classes))
    known = union > 0
    return {
        "semantic.mIoU": _row_means(row[known], intersection[known] / union[known], len(classes)),
        "semantic.pixel_accuracy": ratio(hits, pixels),
    }


def _panoptic(panoptic: pa.StructArray) -> dict[str, Floats]:
    row, _, sums = PanopticState.entries(panoptic)
    high, low, tp, fp, fn = sums.T
    iou = np.ldexp(high.astype(np.float64), -HIGH_BITS) + np.ldexp(low.astype(np.float64), -HIGH_BITS - LOW_BITS)
    weight = tp + 0.5 * fp + 0.5 * fn
    known = weight > 0
    return {"panoptic.PQ": _row_means(row[known], iou[known] / weight[known], len(panoptic))}


def detection_keys(records: pa.StructArray) -> list[str]:
    """The image_key of each row of a column of DETECTION without nulls. Raises SchemaError where a row has not one."""
    keys = pc.struct_field(records, "image_key")
    if len(keys) and pc.any(pc.not_equal(pc.list_value_length(keys), 1)).as_py():
        raise SchemaError("expected the detection records of one image in each row")
    found: list[str] = pc.list_flatten(keys).to_pylist()
    return found


def _detection(records: pa.StructArray, kind: str) -> dict[str, Floats]:
    counts_N3 = np.full((len(records), 3), np.nan)
    rows = np.flatnonzero(records.is_valid().to_numpy(zero_copy_only=False))
    if len(rows):
        keys = detection_keys(records.drop_null())
        # The state's images stand in the order of their keys.
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
        counts_N3[rows[order]] = Detection.from_rows(records).image_counts()
    tp, fp, fn = counts_N3.T
    figures = {"F1": ratio(2 * tp, 2 * tp + fp + fn), "tp": tp, "fp": fp, "fn": fn}
    return {f"detection.{kind}.{name}": values for name, values in figures.items()}


def _depth(depth: pa.StructArray) -> dict[str, Floats]:
    images = pc.fill_null(pc.struct_field(depth, "images"), 0).to_numpy(zero_copy_only=False)
    return {f"depth.{name}": ratio(depth_column(depth, name), images) for name in ("AbsRel", "RMSE", "delta1")}


def depth_column(depth: pa.StructArray, name: str) -> Floats:
    """The sum over a row's images of one depth figure, (N,); 0 for null. Mostly a row is one image."""
    sums = pc.struct_field(depth, ["per_image", name])
    lengths = pc.fill_null(pc.list_value_length(sums), 0).to_numpy(zero_copy_only=False)
    _, items = flat_lists(sums)
    # The first item of an exact sum is the sum, rounded; no items are 0.
    values = np.append(items.to_numpy(zero_copy_only=False), 0.0)
    first: Floats = np.where(lengths > 0, values[np.cumsum(lengths) - lengths], 0.0)
    return first


def _row_means(row: Ints, values: Floats, rows: int) -> Floats:
    return ratio(np.bincount(row, values, rows), np.bincount(row, minlength=rows))
