"""Decoded targets as a model is trained on them: class indices instead of ids, masks and boxes instead of annotations.

Axes: H rows, W columns, N instances.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import ConfigError, SchemaError, TargetMismatchError
from pipeline.masks import decode_rle
from pipeline.metrics.detection_match import Objects
from pipeline.taxonomy import Taxonomy

__all__ = [
    "InstanceMasks",
    "class_index_map",
    "instance_masks",
    "mask_of",
    "output_labels",
    "rle_texts",
    "torchvision_target",
]

IDS = 1 << 16
UNKNOWN = -1
# Of one image's masks: COCO's fullest image needs 30 MB. A file that asks for more is refused, not unpacked.
MAX_MASK_BYTES = 2**31


def class_index_map(
    label_HW: npt.NDArray[np.integer[Any]], taxonomy: Taxonomy, *, unknown_is_void: bool = False
) -> npt.NDArray[Any]:
    """Ids of a taxonomy as class indices: places in its list of categories, which is what a model's outputs are.

    Void (`void_id` and `void_ids`) becomes the taxonomy's `void_id`. uint8 where that is 255, else int32.
    Raises TargetMismatchError for other ids, unless they are taken as void.
    """
    low, high = (int(label_HW.min()), int(label_HW.max())) if label_HW.size else (0, 0)
    if low < 0 or high >= IDS:
        raise TargetMismatchError(f"expected ids of {taxonomy.name}, 0 to {IDS - 1}, got {low} to {high}")
    index_HW = _lookup(taxonomy)[label_HW]
    unknown_HW = index_HW == UNKNOWN
    if unknown_HW.any():
        if not unknown_is_void:
            found = np.unique(label_HW[unknown_HW]).tolist()
            raise TargetMismatchError(
                f"expected ids of {taxonomy.name} or its void, got {found[:10]} ({int(unknown_HW.sum())} pixels)"
            )
        index_HW[unknown_HW] = taxonomy.void_id
    return np.asarray(index_HW, np.uint8 if taxonomy.void_id == 255 else np.int32)


@functools.cache
def _lookup(taxonomy: Taxonomy) -> npt.NDArray[np.int32]:
    table = np.full(IDS, UNKNOWN, np.int32)
    table[[taxonomy.void_id, *taxonomy.void_ids]] = taxonomy.void_id
    table[list(taxonomy.ids)] = np.arange(len(taxonomy.ids))
    return table


@dataclass(frozen=True, eq=False, kw_only=True)
class InstanceMasks:
    """One image's instances. masks_NHW: uint8, 1 inside. labels_N: int64 category ids.

    crowds, maskless, empty: annotations that were left out, because they are crowds, have no segmentation, or have one
    without a pixel in the image (whose box would be degenerate, which torchvision refuses).
    """

    masks_NHW: Tensor
    labels_N: Tensor
    crowds: int
    maskless: int
    empty: int


def instance_masks(
    annotations: Sequence[Mapping[str, Any]], *, height: int, width: int, taxonomy: Taxonomy, boxes: bool = False
) -> InstanceMasks:
    """COCO annotations of one image (as `read_instances` gives them) as masks and labels.

    height, width: of the image, pixels. boxes: an annotation without a segmentation is its box. Labels are the
    taxonomy's ids. Raises TargetMismatchError for ids that the taxonomy lacks and for what is no mask of that size.
    """
    unknown = sorted({item["category_id"] for item in annotations} - set(taxonomy.ids))
    if unknown:
        raise TargetMismatchError(f"the target has categories that {taxonomy.name} lacks: {unknown[:10]}")
    single = [item for item in annotations if not item.get("iscrowd", 0)]
    if boxes:
        single = [item if item.get("segmentation") else {**item, "segmentation": _corners(item)} for item in single]
    masked = [item for item in single if item.get("segmentation")]
    texts = rle_texts(masked, height=height, width=width)
    masks_NHW = np.zeros((len(masked), height, width), np.uint8)
    for mask_HW, text in zip(masks_NHW, texts, strict=True):
        mask_HW[:] = mask_of(text, height=height, width=width)
    filled_N = masks_NHW.any((1, 2))
    return InstanceMasks(
        masks_NHW=torch.from_numpy(masks_NHW[filled_N]),
        labels_N=torch.from_numpy(np.array([item["category_id"] for item in masked], np.int64)[filled_N]),
        crowds=len(annotations) - len(single),
        maskless=len(single) - len(masked),
        empty=int(len(masked) - filled_N.sum()),
    )


def _corners(annotation: Mapping[str, Any]) -> list[list[float]]:
    """The box of an annotation as a polygon, none where there is no box."""
    try:
        x, y, w, h = (float(value) for value in annotation["bbox"])
    except (KeyError, TypeError, ValueError) as error:
        raise TargetMismatchError(f"expected a bbox of x, y, w and h, got {annotation.get('bbox')!r:.80}") from error
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def output_labels(labels_N: Tensor, taxonomy: Taxonomy, *, background: bool) -> Tensor:
    """Ids of a taxonomy as outputs of a model (see `ModelSpec.background`). Raises ConfigError for a taxonomy with a
    category 0 where that is the background."""
    if background:
        if 0 in taxonomy.ids:
            raise ConfigError(f"taxonomy {taxonomy.name} has a category 0, which is the background of this model")
        return labels_N
    places = {id_: place for place, id_ in enumerate(taxonomy.ids)}
    return torch.tensor([places[id_] for id_ in labels_N.tolist()], dtype=torch.int64)


def rle_texts(masked: Sequence[Mapping[str, Any]], *, height: int, width: int) -> list[str]:
    """The segmentations of annotations that have one, as compressed run lengths.

    Raises TargetMismatchError for what is no mask of that size, and where unpacking them all would take too much.
    """
    if len(masked) * height * width > MAX_MASK_BYTES:
        raise TargetMismatchError(
            f"expected masks of at most {MAX_MASK_BYTES} pixels in all, got {len(masked)} of {width}x{height}"
        )
    counts = [rle["counts"] for rle in Objects.from_annotations(masked, height=height, width=width).rles()]
    try:
        return [item if isinstance(item, str) else item.decode("ascii") for item in counts]
    except UnicodeDecodeError as error:
        raise TargetMismatchError(f"expected masks of {width}x{height}: {error}") from error


def mask_of(text: str, *, height: int, width: int) -> npt.NDArray[np.bool_]:
    """One of `rle_texts` as mask_HW. Raises TargetMismatchError."""
    try:
        return decode_rle(text, width=width, height=height)
    except SchemaError as error:
        raise TargetMismatchError(f"expected masks of {width}x{height}: {error}") from error


def torchvision_target(masks_NHW: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    """What torchvision's detectors are trained on: `boxes` (N, 4) float32, x1, y1, x2, y2 in pixels with x2 and y2
    outside, `labels` (N) int64, `masks` (N, H, W) uint8.

    A box is its mask's, before and after augmentation. COCO's own boxes come from the outlines; those of coco128 differ
    by 0.45 pixels in the median, and by up to 4 where an outline's thin end covers no pixel's centre. Raises ValueError
    for a mask without a pixel.
    """
    masks_NHW = torch.as_tensor(masks_NHW, dtype=torch.uint8)
    rows_NH, columns_NW = masks_NHW.amax(2), masks_NHW.amax(1)
    if not bool(rows_NH.any(1).all()):
        raise ValueError("expected masks with at least one pixel each")
    edges = [
        columns_NW.argmax(1),
        rows_NH.argmax(1),
        columns_NW.shape[1] - columns_NW.flip(1).argmax(1),
        rows_NH.shape[1] - rows_NH.flip(1).argmax(1),
    ]
    return {"boxes": torch.stack(edges, dim=1).float(), "labels": labels_N, "masks": masks_NHW}
