"""A prediction as the columns of its row."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

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
    """Masks pasted one by one into one canvas and run-length encoded; ids count from 1 by descending score.

    Pasting follows torchvision's `paste_masks_in_image` (mask padded by one pixel, box grown alike, bilinear,
    probability above 0.5), without its float canvas for each mask. A mask without a pixel is dropped.
    """
    if not len(instances.scores_N):
        return []
    masks, padding = torch.from_numpy(instances.masks_NMM)[:, None], 1
    padded, scale = expand_masks(masks, padding)
    boxes = expand_boxes(torch.from_numpy(instances.boxes_N4), scale).to(torch.int64).tolist()
    canvas_HW = np.zeros((height, width), np.uint8, order="F")
    segments: list[dict[str, Any]] = []
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2 + 1, width), min(y2 + 1, height)
        if right <= left or bottom <= top:
            continue
        size = (max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1))
        mask_HW = functional.interpolate(padded[index : index + 1], size=size, mode="bilinear", align_corners=False)
        inside_HW = mask_HW[0, 0, top - y1 : bottom - y1, left - x1 : right - x1] > MASK_THRESHOLD
        canvas_HW[top:bottom, left:right] = inside_HW.numpy()
        rle = encode_rle(canvas_HW)
        canvas_HW[top:bottom, left:right] = 0
        area = rle_area(rle, width=width, height=height)
        if not area:
            continue
        segments.append(
            {
                "id": len(segments) + 1,
                "category_id": int(instances.category_ids_N[index]),
                "score": float(np.float32(instances.scores_N[index])),
                "area": area,
                "bbox": rle_bbox(rle, width=width, height=height),
                "rle": rle,
            }
        )
    return segments
