"""An image's target, prediction and error as small pictures side by side, from decoded arrays.

Every function returns panels by name (image, target, prediction, error), uint8 RGB of at most PANEL pixels a side, and
leaves out what it cannot draw. Maps are sampled down before they are coloured, matching happens at full size. An image
that is None is drawn gray; it may have another size than its maps.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.metrics.depth_align import DepthKind, DepthOptions, align, crop_window
from pipeline.metrics.detection_match import Objects
from pipeline.metrics.joint import joint_counts
from pipeline.metrics.panoptic import VOID, Segments
from pipeline.overlay import (
    Flags,
    Rgb,
    blend_colors,
    blend_labels,
    blend_masks,
    color_depth,
    color_ramp,
    draw_boxes,
    outline,
)
from pipeline.taxonomy import Taxonomy

__all__ = ["Panels", "depth_panels", "image_panel", "label_panels", "object_panels", "panoptic_panels"]

Panels = dict[str, Rgb]
Map = npt.NDArray[Any]
SegmentMap = tuple[Map, Segments]

PANEL = 360
GRAY = 128
# After Okabe and Ito: colour-blind people tell them apart, by brightness too. style.css has the same.
RIGHT, WRONG, MISSED = (0, 158, 115), (222, 60, 30), (240, 228, 66)
RIGHT_ALPHA = 0.3  # of segments, which fill the picture
# Signed error of depth: the prediction is nearer (blue), right (light), further (red).
ERROR_RAMP = ((5, 48, 150), (90, 150, 215), (238, 238, 235), (230, 120, 85), (160, 10, 35))
ERROR_SPAN = float(np.log(1.5))
MATCH_IOU = 0.5
MAX_OBJECTS = 100


def label_panels(
    image_HWC: Rgb | None, target_HW: Map | None, pred_HW: Map | None, taxonomy: Taxonomy, void: Collection[int] = ()
) -> Panels:
    """Class colours; error: wrong pixels in red, right ones dim, pixels without a target hatched.

    Both maps hold ids of `taxonomy`; `void` lists further ids of the target that are void.
    """
    panels = image_panel(image_HWC)
    for name, map_HW in (("target", target_HW), ("prediction", pred_HW)):
        if map_HW is not None:
            label_HW = _sampled(map_HW)
            panels[name] = blend_labels(_backdrop(image_HWC, label_HW), label_HW, taxonomy)
    if target_HW is not None and pred_HW is not None and target_HW.shape == pred_HW.shape:
        target_HW, pred_HW = _sampled(target_HW), _sampled(pred_HW)
        void_HW = np.isin(target_HW, [*void, *taxonomy.void_ids]) | ~np.isin(target_HW, taxonomy.ids)
        error = _dimmed(_backdrop(image_HWC, target_HW))
        panels["error"] = _hatched(_tinted(error, (target_HW != pred_HW) & ~void_HW, WRONG), void_HW)
    return panels


def panoptic_panels(
    image_HWC: Rgb | None, target: SegmentMap | None, pred: SegmentMap | None, taxonomy: Taxonomy
) -> Panels:
    """Class colours with a border around each segment; error: matched segments green, wrong ones red, missed ones
    yellow, as PQ counts them; void, crowds and ignored predictions hatched.

    target, pred: the map of segment ids (0 = void) and its segments. Raises KeyError where the map has other ids.
    """
    panels = image_panel(image_HWC)
    for name, side in (("target", target), ("prediction", pred)):
        if side is not None:
            segment_HW, segments = _sampled(side[0]), side[1]
            categories = {VOID: taxonomy.void_id} | {int(s["id"]): int(s["category_id"]) for s in segments}
            colors_HWC = _by_value(segment_HW, lambda value, known=categories: taxonomy.palette[known[value]])  # type: ignore[misc]
            panels[name] = blend_colors(_backdrop(image_HWC, segment_HW), colors_HWC, segment_HW)
    if target is None or pred is None or target[0].shape != pred[0].shape:
        return panels
    matched_target, missed, matched_pred, wrong = _match_segments(target, pred)
    target_HW, pred_HW = _sampled(target[0]), _sampled(pred[0])
    error = _dimmed(_backdrop(image_HWC, target_HW))
    error = _tinted(error, np.isin(pred_HW, sorted(matched_pred)), RIGHT, RIGHT_ALPHA)
    error = _tinted(error, np.isin(target_HW, sorted(missed)), MISSED)
    error = _tinted(error, np.isin(pred_HW, sorted(wrong)), WRONG)
    error = _hatched(error, ~np.isin(target_HW, sorted(matched_target | missed)) & ~np.isin(pred_HW, sorted(wrong)))
    for segment in sorted(missed):
        error[outline(target_HW == segment)] = MISSED
    panels["error"] = error
    return panels


def _match_segments(target: SegmentMap, pred: SegmentMap) -> tuple[set[int], set[int], set[int], set[int]]:
    """Ids of matched and missed targets, matched and wrong predictions (panopticapi's rules, see metrics/panoptic)."""
    target_category = {int(s["id"]): int(s["category_id"]) for s in target[1]}
    pred_category = {int(s["id"]): int(s["category_id"]) for s in pred[1]}
    crowds = {int(s["id"]) for s in target[1] if s.get("iscrowd", 0)}
    crowd_of = {target_category[i]: i for i in target_category if i in crowds}  # the last of a category, as panopticapi
    joint = list(zip(*(part.tolist() for part in joint_counts(target[0], pred[0])), strict=True))
    target_area: dict[int, int] = {}
    pred_area: dict[int, int] = {}
    free: dict[int, int] = {}  # pixels in void, or in a crowd of the same category
    void: dict[int, int] = {}
    for target_id, pred_id, pixels in joint:
        target_area[target_id] = target_area.get(target_id, 0) + pixels
        pred_area[pred_id] = pred_area.get(pred_id, 0) + pixels
        if target_id == VOID:
            void[pred_id] = pixels
        if target_id == VOID or crowd_of.get(pred_category.get(pred_id, -1)) == target_id:
            free[pred_id] = free.get(pred_id, 0) + pixels
    target_area |= {int(s["id"]): int(s["area"]) for s in target[1] if "area" in s}
    pairs = [
        (target_id, pred_id)
        for target_id, pred_id, pixels in joint
        if target_id in target_category
        and target_id not in crowds
        and target_category[target_id] == pred_category.get(pred_id)
        and pixels > MATCH_IOU * (target_area[target_id] + pred_area[pred_id] - void.get(pred_id, 0) - pixels)
    ]
    matched_target, matched_pred = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
    unmatched = pred_category.keys() & pred_area.keys() - matched_pred
    wrong = {pred_id for pred_id in unmatched if free.get(pred_id, 0) / pred_area[pred_id] <= 0.5}
    return matched_target, target_category.keys() - crowds - matched_target, matched_pred, wrong


def object_panels(
    image_HWC: Rgb | None, target: Objects | None, pred: Objects | None, taxonomy: Taxonomy, min_score: float
) -> Panels:
    """Masks (or boxes) in class colours; error: at IoU 0.5 found objects green, wrong ones red, missed ones yellow.

    Of the predictions only those of `min_score` or more are drawn and matched, the best MAX_OBJECTS at most.
    """
    panels = image_panel(image_HWC)
    kept = np.zeros(0, np.intp)
    if pred is not None:
        score = np.zeros(len(pred)) if pred.score is None else pred.score
        kept = np.argsort(-score, kind="stable")[:MAX_OBJECTS]
        kept = kept[score[kept] >= min_score]
    for name, side, places in (("target", target, None), ("prediction", pred, kept)):
        if side is not None:
            order = np.argsort(_areas(side))[::-1] if places is None else places[::-1]  # the small and the best on top
            palette = taxonomy.palette[np.minimum(side.category_id, taxonomy.void_id)]
            panels[name] = _draw_objects(_backdrop_of(image_HWC, side), side, [(at, palette[at]) for at in order])
    if target is not None and pred is not None and (target.width, target.height) == (pred.width, pred.height):
        matched, wrong, missed = _match_objects(target, pred, kept)
        error = _dimmed(_backdrop_of(image_HWC, target))
        error = _draw_objects(error, target, [(at, MISSED) for at in missed])
        error = _draw_objects(error, pred, [*((at, RIGHT) for at in matched), *((at, WRONG) for at in wrong)])
        panels["error"] = error
    return panels


def _match_objects(
    target: Objects, pred: Objects, kept: npt.NDArray[np.intp]
) -> tuple[list[int], list[int], list[int]]:
    """Places of found and wrong predictions and of missed targets: each prediction of `kept`, best first, takes the
    free target of its category with the largest IoU; what lies in a crowd is neither found nor wrong."""
    kind = "segm" if _has_masks(target) and _has_masks(pred) else "bbox"
    crowd = np.zeros(len(target), bool) if target.crowd is None else target.crowd
    iou_DG = np.zeros((len(kept), len(target)))
    if iou_DG.size:
        pred_shapes, target_shapes = pred.shapes(kind)[0][kept], target.shapes(kind)[0]  # type: ignore[arg-type]
        sides = (pred_shapes, target_shapes) if kind == "bbox" else (pred_shapes.tolist(), target_shapes.tolist())
        iou_DG = coco_mask.iou(*sides, crowd.astype(np.uint8))
    iou_DG = np.where(pred.category_id[kept][:, None] == target.category_id, iou_DG, 0.0)
    free = ~crowd
    matched, wrong = [], []
    for row, at in enumerate(kept.tolist()):
        overlap = np.where(free, iou_DG[row], 0.0)
        if len(overlap) and overlap.max() >= MATCH_IOU:
            free[int(overlap.argmax())] = False
            matched.append(at)
        elif not (iou_DG[row][crowd] >= MATCH_IOU).any():
            wrong.append(at)
    return matched, wrong, np.flatnonzero(free).tolist()


def depth_panels(
    image_HWC: Rgb | None,
    target_HW: npt.NDArray[np.floating[Any]] | None,
    pred_HW: npt.NDArray[np.floating[Any]] | None,
    kind: DepthKind,
    options: DepthOptions,
) -> Panels:
    """Near is bright, hatched is without depth; error: ln(prediction / target) as it is scored, after alignment, blue
    where the prediction is nearer and red where it is further, full at a factor of 1.5.

    The prediction has the target's colours for the same depth, or its own range where it is aligned before it is
    scored. Raises PredictError for infinite depth without a max_depth.
    """
    panels = image_panel(image_HWC)
    span = None
    if target_HW is not None:
        known = target_HW[np.isfinite(target_HW)]
        comparable = kind == "metric_m" and options.alignment == "none" and known.size
        span = (float(np.percentile(known, 2)), float(np.percentile(known, 98))) if comparable else None
        panels["target"] = _depth_picture(target_HW, span)
    if pred_HW is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            depth_HW = 1 / np.maximum(pred_HW, 0) if kind == "inverse_relative" else pred_HW
        panels["prediction"] = _depth_picture(depth_HW, span)
    if target_HW is not None and pred_HW is not None and target_HW.shape == pred_HW.shape:
        inside_HW = np.zeros(target_HW.shape, bool)
        inside_HW[crop_window(options.crop, *target_HW.shape)] = True
        with np.errstate(invalid="ignore"):
            inside_HW &= (target_HW > options.min_depth) & (target_HW < (options.max_depth or np.inf))
        error_HW = np.full(target_HW.shape, np.nan)
        if inside_HW.any():
            g = target_HW[inside_HW].astype(np.float64)
            error_HW[inside_HW] = np.log(align(pred_HW[inside_HW].astype(np.float64), g, kind, options) / g)
        error_HW = _sampled(error_HW)
        colors = color_ramp(np.nan_to_num(error_HW) / (2 * ERROR_SPAN) + 0.5, ERROR_RAMP)
        panels["error"] = _hatched(colors, np.isnan(error_HW))
    return panels


def _depth_picture(depth_HW: npt.NDArray[np.floating[Any]], span: tuple[float, float] | None) -> Rgb:
    depth_HW = _sampled(depth_HW)
    return _hatched(color_depth(depth_HW, span), ~np.isfinite(depth_HW))


def _panel_size(height: int, width: int) -> tuple[int, int]:
    scale = min(1.0, PANEL / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _sampled(map_HW: Map) -> Map:
    """The nearest values at the size of a panel."""
    height, width = map_HW.shape
    new_height, new_width = _panel_size(height, width)
    rows = (np.arange(new_height) * 2 + 1) * height // (2 * new_height)
    columns = (np.arange(new_width) * 2 + 1) * width // (2 * new_width)
    sampled_HW: Map = map_HW[rows[:, None], columns]
    return sampled_HW


def image_panel(image_HWC: Rgb | None) -> Panels:
    """The image alone, nothing where there is none."""
    return {} if image_HWC is None else {"image": _resized(image_HWC, _panel_size(*image_HWC.shape[:2]))}


def _resized(image_HWC: Rgb, size: tuple[int, int]) -> Rgb:
    return np.asarray(Image.fromarray(image_HWC).resize((size[1], size[0]), Image.Resampling.BOX, reducing_gap=2.0))


def _backdrop(image_HWC: Rgb | None, map_HW: Map) -> Rgb:
    """The image at the size of a sampled map."""
    if image_HWC is None:
        return np.full((*map_HW.shape, 3), GRAY, np.uint8)
    return _resized(image_HWC, (map_HW.shape[0], map_HW.shape[1]))


def _backdrop_of(image_HWC: Rgb | None, objects: Objects) -> Rgb:
    return _backdrop(image_HWC, np.empty(_panel_size(objects.height, objects.width), bool))


def _dimmed(image_HWC: Rgb) -> Rgb:
    gray_HW1 = image_HWC.mean(axis=2, keepdims=True) * 0.45 + 30
    return np.repeat(gray_HW1, 3, axis=2).astype(np.uint8)


def _tinted(image_HWC: Rgb, mask_HW: Flags, color: tuple[int, int, int], alpha: float = 0.65) -> Rgb:
    """Mostly the colour, so that it can be read on any image."""
    tinted = image_HWC.copy()
    tinted[mask_HW] = (image_HWC[mask_HW] * (1 - alpha) + np.array(color) * alpha).astype(np.uint8)
    return tinted


def _hatched(image_HWC: Rgb, mask_HW: Flags) -> Rgb:
    height, width = mask_HW.shape
    diagonal_HW = np.arange(height)[:, None] + np.arange(width)
    stripes_HW = np.where(diagonal_HW // 3 % 2, 96, 130).astype(np.uint8)
    return np.where(mask_HW[..., None], stripes_HW[..., None], image_HWC)


def _by_value(map_HW: Map, look_up: Callable[[int], Any]) -> Rgb:
    """Each pixel's colour by the value that it has."""
    values, place_HW = np.unique(map_HW, return_inverse=True)
    table = np.array([look_up(value) for value in values.tolist()], np.uint8)
    colors_HWC: Rgb = table[place_HW.reshape(map_HW.shape)]
    return colors_HWC


def _has_masks(objects: Objects) -> bool:
    return objects.segmentation is not None and all(objects.segmentation)


def _areas(objects: Objects) -> npt.NDArray[np.float64]:
    return objects.shapes("segm" if _has_masks(objects) else "bbox")[1]


def _draw_objects(image_HWC: Rgb, objects: Objects, chosen: Iterable[tuple[int, Any]]) -> Rgb:
    """The objects at these places in these colours, the last on top: as masks, or as boxes where they have none."""
    if _has_masks(objects):
        rles: list[Mapping[str, Any]] = objects.rles()
        return blend_masks(
            image_HWC, ((_sampled(np.asarray(coco_mask.decode(rles[at]), bool)), color) for at, color in chosen)
        )
    boxes_N4 = objects.shapes("bbox")[0]
    scale = np.array([image_HWC.shape[1] / objects.width, image_HWC.shape[0] / objects.height] * 2)
    return draw_boxes(image_HWC, (((boxes_N4[at] * scale).tolist(), color) for at, color in chosen))
