"""From queries, each with a class and a mask, to label maps, panoptic segments and instances.

Axes: B batch, Q queries, C classes and after them no object, K classes, H rows, W columns; h and w those of the masks.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.masks import encode_rle
from pipeline.models.spec import Frame, Instances, PostContext, Prediction, Quality

__all__ = ["Queries", "check_thresholds", "instances", "panoptic"]

# Values of masks that stand at the decoded size at once (16 MiB), and the fewest masks.
CHUNK_PIXELS = 1 << 22
CHUNK = 4
EPSILON = 1e-6


class Queries(dict[str, Tensor]):
    """What a model of queries says of a padded batch: `classes` (B, Q, C) and `masks` (B, Q, h, w), both logits.

    padded: height and width of the batch that the masks cover, pixels. mask_threshold, overlap_threshold: see
    `check_thresholds`.
    """

    def __init__(
        self,
        classes_BQC: Tensor,
        masks_BQhw: Tensor,
        *,
        padded: tuple[int, int],
        mask_threshold: float = 0.5,
        overlap_threshold: float = 0.8,
    ) -> None:
        super().__init__(classes=classes_BQC, masks=masks_BQhw)
        self.padded = padded
        self.mask_threshold, self.overlap_threshold = mask_threshold, overlap_threshold


def check_thresholds(mask_threshold: float, overlap_threshold: float) -> None:
    """mask_threshold: the probability above which a pixel is a mask's. overlap_threshold: the least share of those
    pixels that a segment of a panoptic prediction wins against the other masks. Raises ValueError for others than
    shares."""
    if not 0 < mask_threshold < 1 or not 0 <= overlap_threshold <= 1:
        raise ValueError(
            "mask_threshold must be between 0 and 1 and overlap_threshold from 0 to 1, "
            f"got {mask_threshold} and {overlap_threshold}"
        )


def panoptic(output: Queries, frames: Sequence[Frame], context: PostContext) -> list[Prediction]:
    """A label map and disjoint segments of things and stuff per frame; at most `max_segments` queries above
    `score_threshold` (Cheng et al. 2021, arXiv:2107.06278, section 3.4 and its authors' code).

    The label map is the class with the largest sum over queries of class probability times mask probability, summed at
    the masks' resolution and brought to the decoded size. A segment's pixels are those where its class probability
    times its mask probability is the largest, and which are its mask's; it goes where it wins too few of the latter.
    Stuff of one class is one segment, whose score is its best query's.
    """
    predictions = []
    for classes_QC, masks_Qhw, frame in zip(output["classes"].float(), output["masks"].float(), frames, strict=True):
        label_HW, quality = _label_map(classes_QC, masks_Qhw, frame, output.padded, context)
        found = _segments(classes_QC, masks_Qhw, frame, output, context)
        predictions.append(Prediction(label_HW=label_HW, instances=found, quality=quality))
    return predictions


def instances(output: Queries, frames: Sequence[Frame], context: PostContext) -> list[Prediction]:
    """Things, which may overlap, per frame: the best `max_segments` of at least `score_threshold`.

    Of all pairs of query and class the Q likeliest are looked at; a score is the class probability times the mean
    probability inside the mask (Cheng et al. 2022, arXiv:2112.01527, and its authors' code).
    """
    return [
        Prediction(instances=_instances(classes_QC, masks_Qhw, frame, output, context))
        for classes_QC, masks_Qhw, frame in zip(output["classes"].float(), output["masks"].float(), frames, strict=True)
    ]


def _at_size(maps_NHW: Tensor, frame: Frame, padded: tuple[int, int]) -> Tensor:
    """Maps of the padded batch at the image's own size: upsampled, cut, resized, as the authors do."""
    if maps_NHW.shape[-2:] != padded:
        maps_NHW = functional.interpolate(maps_NHW[None], size=padded, mode="bilinear")[0]
    maps_NHW = maps_NHW[:, : frame.prepared_height, : frame.prepared_width]
    size = (frame.height, frame.width)
    if maps_NHW.shape[-2:] != size:
        maps_NHW = functional.interpolate(maps_NHW[None], size=size, mode="bilinear")[0]
    return maps_NHW


def _chunks(maps_NHW: Tensor, frame: Frame, padded: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
    """A few of the maps at a time at the image's size, with the place of their first."""
    pixels = max(frame.height * frame.width, padded[0] * padded[1])
    count = max(CHUNK, CHUNK_PIXELS // pixels)
    for start in range(0, len(maps_NHW), count):
        yield start, _at_size(maps_NHW[start : start + count], frame, padded)


def _winner(maps: Iterator[tuple[int, Tensor]], value_HW: Tensor, place_HW: Tensor) -> None:
    """The largest value of all maps and its place, written into the two; the first of equal ones."""
    for start, values_NHW in maps:
        largest_HW, index_HW = values_NHW.max(0)
        better_HW = largest_HW > value_HW
        value_HW.copy_(torch.where(better_HW, largest_HW, value_HW))
        place_HW.copy_(torch.where(better_HW, index_HW + start, place_HW))


def _label_map(
    classes_QC: Tensor, masks_Qhw: Tensor, frame: Frame, padded: tuple[int, int], context: PostContext
) -> tuple[npt.NDArray[Any], Quality]:
    scores_Khw = torch.einsum("qk,qhw->khw", classes_QC.softmax(-1)[:, :-1], masks_Qhw.sigmoid())
    value_HW = torch.full((frame.height, frame.width), -math.inf, device=scores_Khw.device)
    place_HW = torch.zeros_like(value_HW, dtype=torch.int64)
    _winner(_chunks(scores_Khw, frame, padded), value_HW, place_HW)
    ids = np.asarray(context.taxonomy.ids, context.taxonomy.dtype)
    rows, columns = (
        max(1, math.ceil(length * side / whole))
        for length, side, whole in zip(
            scores_Khw.shape[1:], (frame.prepared_height, frame.prepared_width), padded, strict=True
        )
    )
    return ids[place_HW.cpu().numpy()], _quality(scores_Khw[:, :rows, :columns], context.low_confidence)


def _quality(scores_Khw: Tensor, low_confidence: float) -> Quality:
    """Of the classes' scores as probabilities, one pixel of the masks each."""
    probability = scores_Khw / scores_Khw.sum(0).clamp_min(torch.finfo(scores_Khw.dtype).tiny)
    largest = probability.amax(0)
    entropy = torch.special.entr(probability).sum(0)
    values = torch.stack([largest.mean(), entropy.mean(), (largest < low_confidence).float().mean()]).cpu().tolist()
    return Quality(*values)


def _segments(classes_QC: Tensor, masks_Qhw: Tensor, frame: Frame, output: Queries, context: PostContext) -> Instances:
    scores_Q, classes_Q = classes_QC.softmax(-1).max(-1)
    order = torch.argsort(scores_Q, descending=True, stable=True)
    wanted_Q = (classes_Q != classes_QC.shape[1] - 1) & (scores_Q > context.score_threshold)
    order = order[wanted_Q[order]][: context.max_segments]
    scores_N = scores_Q[order]
    value_HW = torch.full((frame.height, frame.width), -math.inf, device=masks_Qhw.device)
    place_HW = torch.full_like(value_HW, -1, dtype=torch.int64)
    inside_HW = torch.zeros_like(value_HW, dtype=torch.bool)
    areas: list[int] = []
    for start, logits_NHW in _chunks(masks_Qhw[order], frame, output.padded):
        probability_NHW = logits_NHW.sigmoid_()
        of_mask_NHW = probability_NHW >= output.mask_threshold
        areas += of_mask_NHW.sum((1, 2)).tolist()
        weighted_NHW = probability_NHW * scores_N[start : start + len(logits_NHW), None, None]
        largest_HW, index_HW = weighted_NHW.max(0)
        better_HW = largest_HW > value_HW
        value_HW = torch.where(better_HW, largest_HW, value_HW)
        place_HW = torch.where(better_HW, index_HW + start, place_HW)
        inside_HW = torch.where(better_HW, of_mask_NHW.gather(0, index_HW[None])[0], inside_HW)
    won = torch.bincount(place_HW.flatten() + 1, minlength=len(order) + 1)[1:].tolist()
    segment_HW, picked = _numbered(
        torch.where(inside_HW, place_HW, -1).cpu().numpy(),
        [bool(area) and share / area >= output.overlap_threshold for share, area in zip(won, areas, strict=True)],
        [context.taxonomy.ids[place] for place in classes_Q[order].tolist()],
        context,
    )
    return Instances(
        boxes_N4=np.zeros((len(picked), 4), np.float32),
        scores_N=scores_N.cpu().numpy()[picked].astype(np.float32),
        category_ids_N=np.array([context.taxonomy.ids[classes_Q[order[at]]] for at in picked], np.int64),
        rles=tuple(encode_rle(segment_HW == number) for number in range(1, len(picked) + 1)),
    )


def _numbered(
    place_HW: npt.NDArray[np.int64], kept: Sequence[bool], category_ids: Sequence[int], context: PostContext
) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Places of queries (-1 = none) as a map of segments from 1 and the place of each segment's first query."""
    areas = np.bincount(place_HW.ravel() + 1, minlength=len(kept) + 1)[1:]
    numbers = np.zeros(len(kept) + 1, np.int64)  # the last is that of place -1
    stuff: dict[int, int] = {}
    picked: list[int] = []
    for at, (keep, category_id) in enumerate(zip(kept, category_ids, strict=True)):
        if not keep or not areas[at]:
            continue
        if category_id in stuff:
            numbers[at] = stuff[category_id]
            continue
        picked.append(at)
        numbers[at] = len(picked)
        if context.taxonomy.by_id[category_id].kind == "stuff":
            stuff[category_id] = len(picked)
    return numbers[place_HW], picked


def _instances(classes_QC: Tensor, masks_Qhw: Tensor, frame: Frame, output: Queries, context: PostContext) -> Instances:
    taxonomy = context.taxonomy
    probability_QK = classes_QC.softmax(-1)[:, :-1]
    classes = probability_QK.shape[1]
    scores_N, index_N = probability_QK.flatten().topk(len(probability_QK))
    thing_K = torch.tensor([category.kind == "thing" for category in taxonomy.categories], device=index_N.device)
    wanted_N = thing_K[index_N % classes] & (scores_N >= context.score_threshold)
    scores_N, index_N = scores_N[wanted_N], index_N[wanted_N]
    limit = math.log(output.mask_threshold / (1 - output.mask_threshold))
    scores: list[float] = []
    rles: list[str] = []
    places: list[int] = []
    for start, logits_NHW in _chunks(masks_Qhw[index_N // classes], frame, output.padded):
        mask_NHW = logits_NHW > limit
        mean_N = (logits_NHW.sigmoid() * mask_NHW).sum((1, 2)) / (mask_NHW.sum((1, 2)) + EPSILON)
        score_N = scores_N[start : start + len(logits_NHW)] * mean_N
        for at in torch.nonzero((score_N >= context.score_threshold) & mask_NHW.any(2).any(1)).flatten().tolist():
            scores.append(float(score_N[at]))
            rles.append(encode_rle(mask_NHW[at].cpu().numpy()))
            places.append(int(index_N[start + at] % classes))
    order = np.argsort(-np.array(scores), kind="stable")[: context.max_segments].tolist()
    return Instances(
        boxes_N4=np.zeros((len(order), 4), np.float32),
        scores_N=np.array([scores[at] for at in order], np.float32),
        category_ids_N=np.array([taxonomy.ids[places[at]] for at in order], np.int64),
        rles=tuple(rles[at] for at in order),
    )
