"""A prediction as the columns of its row."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from pipeline.masks import MapFormat, encode_depth, encode_label_map, encode_rle, rle_area, rle_bbox
from pipeline.models.spec import Instances, Prediction

__all__ = ["encode", "encode_instances"]

MASK_THRESHOLD = 0.5


def encode(prediction: Prediction, form: MapFormat, *, width: int, height: int) -> dict[str, Any]:
    """The table's columns `semantic`, `segments`, `depth` and `quality`; those that the task lacks are left out."""
    columns: dict[str, Any] = {}
    if prediction.label_HW is not None:
        columns["semantic"] = {"format": form, "data": encode_label_map(prediction.label_HW, form)}
    if prediction.instances is not None:
        columns["segments"] = encode_instances(prediction.instances, width=width, height=height)
    if prediction.depth_HW is not None:
        columns["depth"] = encode_depth(prediction.depth_HW, prediction.depth_kind, form)
    if prediction.quality is not None:
        quality = prediction.quality
        columns["quality"] = {
            "mean_max_probability": quality.mean_max_probability,
            "mean_entropy": quality.mean_entropy,
            "low_confidence_share": quality.low_confidence_share,
        }
    return columns


def encode_instances(instances: Instances, *, width: int, height: int) -> list[dict[str, Any]]:
    """The table's `segments`; ids count from 1 in the order of the instances. A mask without a pixel is dropped, and so
    is a box without an area."""
    if not len(instances.scores_N):
        return []
    if instances.rles is not None:
        shapes = [_of_mask(rle, width, height) if rle else None for rle in instances.rles]
    elif instances.masks_NMM is not None:
        shapes = [
            None if rle is None else _of_mask(rle, width, height)
            for rle in _pasted(instances.boxes_N4, instances.masks_NMM, width, height)
        ]
    else:
        shapes = [_of_box(box, width, height) for box in instances.boxes_N4.tolist()]
    kept = [(index, shape) for index, shape in enumerate(shapes) if shape is not None and shape["area"]]
    return [
        {
            "id": number,
            "category_id": int(instances.category_ids_N[index]),
            "score": float(np.float32(instances.scores_N[index])),
            **shape,
        }
        for number, (index, shape) in enumerate(kept, 1)
    ]


def _of_mask(rle: str, width: int, height: int) -> dict[str, Any]:
    area = rle_area(rle, width=width, height=height)
    return {"area": area, "bbox": rle_bbox(rle, width=width, height=height), "rle": rle}


def _of_box(box: list[float], width: int, height: int) -> dict[str, Any]:
    """A box within the image, without a mask."""
    x1, y1, x2, y2 = (min(max(edge, 0.0), limit) for edge, limit in zip(box, [width, height] * 2, strict=True))
    w, h = max(x2 - x1, 0.0), max(y2 - y1, 0.0)
    return {"area": round(w * h) or int(w * h > 0), "bbox": (x1, y1, w, h), "rle": None}


def _pasted(
    boxes_N4: npt.NDArray[np.float32], masks_NMM: npt.NDArray[np.float32], width: int, height: int
) -> Iterator[str | None]:
    """Masks in their boxes as run lengths, pasted one by one into one canvas; None for a box outside of the image.

    Pasting follows torchvision's `paste_masks_in_image` (mask padded by one pixel, box grown alike, bilinear,
    probability above 0.5), without its float canvas for each mask.
    """
    # Imported here: it takes seconds, and models without such masks do without.
    from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

    masks, padding = torch.from_numpy(masks_NMM)[:, None], 1
    padded, scale = expand_masks(masks, padding)
    boxes = expand_boxes(torch.from_numpy(boxes_N4), scale).to(torch.int64).tolist()
    canvas_HW = np.zeros((height, width), np.uint8, order="F")
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2 + 1, width), min(y2 + 1, height)
        if right <= left or bottom <= top:
            yield None
            continue
        size = (max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1))
        mask_HW = functional.interpolate(padded[index : index + 1], size=size, mode="bilinear", align_corners=False)
        inside_HW = mask_HW[0, 0, top - y1 : bottom - y1, left - x1 : right - x1] > MASK_THRESHOLD
        canvas_HW[top:bottom, left:right] = inside_HW.numpy()
        yield encode_rle(canvas_HW)
        canvas_HW[top:bottom, left:right] = 0
