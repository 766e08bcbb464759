"""What detectors have in common: images stretched to one size, and outputs that become category ids."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.postprocess import objects
from pipeline.models.spec import Frame, PostContext, Prediction

__all__ = ["center_boxes", "corner_boxes", "known_objects", "placed_objects", "stretch", "stretch_masks"]


def stretch(image_BCHW: Tensor, frames: Sequence[Frame], size: int) -> Tensor:
    """Each image without its padding at size x size pixels, whatever its sides are to each other (bilinear)."""
    parts = (
        image_CHW[:, : frame.prepared_height, : frame.prepared_width]
        for image_CHW, frame in zip(image_BCHW, frames, strict=True)
    )
    square = [
        part_CHW
        if part_CHW.shape[1:] == (size, size)
        else functional.interpolate(part_CHW[None], size=(size, size), mode="bilinear", antialias=True)[0]
        for part_CHW in parts
    ]
    return torch.stack(square)


def stretch_masks(masks_NHW: Tensor, frame: Frame, size: int) -> Tensor:
    """An image's masks as `stretch` leaves the image: float 0 or 1, of the nearest pixel."""
    part_NHW = masks_NHW[:, : frame.prepared_height, : frame.prepared_width].float()
    if not len(part_NHW):
        return part_NHW.new_zeros(0, size, size)
    return functional.interpolate(part_NHW[None], size=(size, size), mode="nearest-exact")[0]


def center_boxes(boxes_N4: Tensor, frame: Frame) -> Tensor:
    """x1, y1, x2, y2 in prepared pixels -> centre x, centre y, width, height as shares of the image without padding."""
    low_N2, high_N2 = boxes_N4[:, :2], boxes_N4[:, 2:]
    size = boxes_N4.new_tensor([frame.prepared_width, frame.prepared_height] * 2)
    return torch.cat([(low_N2 + high_N2) / 2, high_N2 - low_N2], dim=1) / size


def corner_boxes(boxes_N4: Tensor, frame: Frame) -> Tensor:
    """The inverse of `center_boxes`; boxes may reach beyond the image."""
    center_N2, half_N2 = boxes_N4[:, :2], boxes_N4[:, 2:] / 2
    size = boxes_N4.new_tensor([frame.prepared_width, frame.prepared_height] * 2)
    return torch.cat([center_N2 - half_N2, center_N2 + half_N2], dim=1) * size


def known_objects(
    output: Sequence[Mapping[str, Tensor]], frames: Sequence[Frame], context: PostContext
) -> list[Prediction]:
    """`objects` of a model whose outputs are ids; those of no category (0, and COCO left some out) are dropped."""
    kept = []
    for detection in output:
        known_N = torch.isin(detection["labels"], detection["labels"].new_tensor(context.taxonomy.ids))
        kept.append({name: tensor[known_N] for name, tensor in detection.items()})
    return objects(kept, frames, context)


def placed_objects(
    output: Sequence[Mapping[str, Tensor]], frames: Sequence[Frame], context: PostContext
) -> list[Prediction]:
    """`objects` of a model whose outputs are places in the taxonomy's list."""
    placed = []
    for detection in output:
        ids = detection["labels"].new_tensor(context.taxonomy.ids)
        placed.append({**detection, "labels": ids[detection["labels"]]})
    return objects(placed, frames, context)
