"""What a model says of a few images, after every validation as one picture: image, target and prediction side by side.

The images are the same in every epoch, so that whoever leafs through the sheets sees the model learn. A worker draws
those that it validates; the small pictures travel to rank 0, not the maps.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.metrics.confusion import Confusion
from pipeline.metrics.depth import Depth
from pipeline.metrics.depth_align import DepthKind, DepthOptions
from pipeline.metrics.detection_match import Objects
from pipeline.metrics.panoptic import PanopticState
from pipeline.models.spec import Task
from pipeline.overlay import DEPTH_RAMP, Rgb
from pipeline.panels import (
    PANEL,
    Panels,
    SegmentMap,
    depth_panels,
    image_panel,
    label_panels,
    object_panels,
    panoptic_panels,
)
from pipeline.sheet import lay_out
from pipeline.taxonomy import Taxonomy

__all__ = [
    "Draw",
    "Drawn",
    "Shown",
    "draw_depth",
    "draw_labels",
    "draw_objects",
    "draw_segments",
    "draw_sheet",
    "sheet_places",
    "show",
]

COLUMNS = ("image", "target", "prediction")
MIN_SCORE = 0.5
MESSAGE_CHARACTERS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """One image's panels by name. text: its own figure. category_ids: of the classes that are in the panels."""

    panels: Panels
    text: str
    category_ids: Iterable[int] = ()


Draw = Callable[[Rgb], Drawn]  # from image_HWC


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One image of a sheet, small enough to travel as JSON.

    place: of the image in the validation's plan. pictures: base64 of a PNG for each of COLUMNS that could be drawn, the
    missing ones at the end. category_ids: of the classes in them.
    """

    place: int
    caption: str
    pictures: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()

    def to_row(self) -> dict[str, Any]:
        return {
            "place": self.place,
            "caption": self.caption,
            "pictures": list(self.pictures),
            "category_ids": list(self.category_ids),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Shown":
        return cls(
            place=row["place"],
            caption=row["caption"],
            pictures=tuple(row["pictures"]),
            category_ids=tuple(row["category_ids"]),
        )


def sheet_places(images: int, count: int) -> list[int]:
    """Which of a plan's images are shown: `count` of them, or all where there are fewer, each from the middle of one of
    as many equal parts."""
    count = min(count, images)
    return [(2 * part + 1) * images // (2 * count) for part in range(count)]


def show(place: int, image_id: str, image_HWC: Rgb | None, draw: Draw | Exception) -> Shown:
    """The pictures of one image. draw: how its maps are drawn, or why there are none; then the image stands alone."""
    drawn = Drawn({}, "")
    try:
        if isinstance(draw, Exception):
            raise draw
        if image_HWC is not None:
            drawn = draw(image_HWC)
    except Exception as error:  # noqa: BLE001  (no picture is worth a run)
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:MESSAGE_CHARACTERS]}"
        drawn = Drawn(image_panel(image_HWC), text)
    pictures = [drawn.panels[name] for name in COLUMNS if name in drawn.panels]
    return Shown(
        place=place,
        caption=f"{image_id}   {drawn.text}",
        pictures=tuple(map(_encoded, pictures)),
        category_ids=tuple(sorted(drawn.category_ids)),
    )


def draw_labels(
    confusion: Confusion, target_HW: npt.NDArray[Any], pred_HW: npt.NDArray[Any], taxonomy: Taxonomy, image_HWC: Rgb
) -> Drawn:
    """Label maps in ids of the taxonomy. confusion: of this image alone."""
    panels = label_panels(image_HWC, target_HW, pred_HW, taxonomy)
    found = {*np.unique(target_HW).tolist(), *np.unique(pred_HW).tolist()}
    return Drawn(panels, f"mIoU {_number(confusion.compute()['mIoU'])}", found & set(taxonomy.ids))


def draw_depth(
    depth: Depth,
    target_HW: npt.NDArray[np.floating[Any]],
    pred_HW: npt.NDArray[np.floating[Any]],
    kind: DepthKind,
    options: DepthOptions,
    image_HWC: Rgb,
) -> Drawn:
    """Depth in metres, both in the colours of the target's range. depth: the errors of this image alone."""
    panels = depth_panels(image_HWC, target_HW, pred_HW, kind, options)
    return Drawn(panels, f"AbsRel {_number(depth.compute()['AbsRel'])}")


def draw_objects(target: Objects, pred: Objects, taxonomy: Taxonomy, image_HWC: Rgb) -> Drawn:
    """Objects with the model's categories; of the predictions those with a score of MIN_SCORE or more."""
    panels = object_panels(image_HWC, target, pred, taxonomy, MIN_SCORE)
    score = np.zeros(len(pred)) if pred.score is None else pred.score
    drawn = score >= MIN_SCORE
    found = {*target.category_id.tolist(), *pred.category_id[drawn].tolist()}
    crowds = 0 if target.crowd is None else int(target.crowd.sum())
    text = f"{int(drawn.sum())} predicted with a score of {MIN_SCORE} or more, {len(target) - crowds} in the target"
    text += f", {crowds} crowd{'s' if crowds > 1 else ''}" if crowds else ""
    return Drawn(panels, text, found & set(taxonomy.ids))


def draw_segments(
    state: PanopticState, target: SegmentMap, pred: SegmentMap, taxonomy: Taxonomy, image_HWC: Rgb
) -> Drawn:
    """Panoptic maps with their segments. state: the quality of this image alone."""
    panels = panoptic_panels(image_HWC, target, pred, taxonomy)
    found = {int(segment["category_id"]) for side in (target, pred) for segment in side[1]}
    return Drawn(panels, f"PQ {_number(state.compute(taxonomy)['All']['PQ'])}", found & set(taxonomy.ids))


def draw_sheet(shown: Sequence[Shown], task: Task, taxonomy: Taxonomy, title: str) -> bytes:
    """The sheet as a PNG, the same bytes whichever workers drew its pictures."""
    ordered = sorted(shown, key=lambda item: item.place)
    found = {identifier for item in ordered for identifier in item.category_ids}
    legend = [(category.name, category.color) for category in taxonomy.categories if category.id in found]
    if task == "depth":
        legend = [("near", DEPTH_RAMP[-1]), ("far", DEPTH_RAMP[0])]
    rows = [(item.caption, [_decoded(data) for data in item.pictures]) for item in ordered]
    buffer = io.BytesIO()
    lay_out(rows, COLUMNS, legend, title, tile=PANEL).save(buffer, "PNG")
    return buffer.getvalue()


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "– (no evidence)"


def _encoded(picture: Rgb) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _decoded(data: str) -> Rgb:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
