"""From a model's output to predictions at each image's own size: one function per task."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.spec import Frame, Instances, PostContext, Postprocess, Prediction, Quality, Task

__all__ = ["POSTPROCESS", "POSTPROCESS_VERSION", "dense_output", "semantic_from_index", "semantic_from_logits"]

# Part of every model_version: raise it when the same output would become other labels.
POSTPROCESS_VERSION = 1
QUALITY_STRIDE = 4


def dense_output(output: Any) -> Tensor:
    """The dense tensor of an output: logits_BKHW, or torchvision's {"out": logits_BKHW}."""
    tensor = output["out"] if isinstance(output, Mapping) else output
    if not isinstance(tensor, Tensor) or tensor.ndim != 4:
        raise TypeError(f"expected a tensor of B, K, H, W, got {type(tensor).__name__} {getattr(tensor, 'shape', '')}")
    return tensor


def semantic(output: Any, frames: Sequence[Frame], context: PostContext) -> list[Prediction]:
    """logits_BKHW of a padded batch -> one label map per frame."""
    logits_BKHW = dense_output(output).float()
    return [
        semantic_from_logits(logits_KHW[:, : frame.prepared_height, : frame.prepared_width], frame, context)
        for logits_KHW, frame in zip(logits_BKHW, frames, strict=True)
    ]


def semantic_from_logits(logits_KHW: Tensor, frame: Frame, context: PostContext) -> Prediction:
    """Logits are brought to the image's size (bilinear, half-pixel centres) before the argmax, as the official
    evaluations do; ties go to the lowest class."""
    quality = _quality(logits_KHW[:, ::QUALITY_STRIDE, ::QUALITY_STRIDE], context.low_confidence)
    return Prediction(label_HW=_to_ids(_argmax_at_size(logits_KHW, frame), context), quality=quality)


def semantic_from_index(index_HW: Tensor, logits_KHW: Tensor, frame: Frame, context: PostContext) -> Prediction:
    """Decided classes (places in the taxonomy's list) reach the image's size by the nearest pixel; `logits_KHW` say how
    sure the model was of them."""
    quality = _quality(logits_KHW[:, ::QUALITY_STRIDE, ::QUALITY_STRIDE], context.low_confidence)
    size = (frame.height, frame.width)
    if index_HW.shape != size:
        # float32 holds every class number exactly, and is what all devices resize.
        index_HW = functional.interpolate(index_HW[None, None].float(), size=size, mode="nearest-exact")[0, 0]
    return Prediction(label_HW=_to_ids(index_HW, context), quality=quality)


def _argmax_at_size(logits_KHW: Tensor, frame: Frame) -> Tensor:
    size = (frame.height, frame.width)
    if logits_KHW.shape[1:] != size:
        # With a pixel's classes side by side resizing is 4 times faster on the CPU than on a cut of a padded map, and
        # `max` is 5 times faster than `argmax`; both give the first of equal values.
        packed_1KHW = logits_KHW[None].contiguous(memory_format=torch.channels_last)
        logits_KHW = functional.interpolate(packed_1KHW, size=size, mode="bilinear", align_corners=False)[0]
    return logits_KHW.max(0).indices


def _to_ids(index_HW: Tensor, context: PostContext) -> np.ndarray[Any, Any]:
    ids = np.asarray(context.taxonomy.ids, context.taxonomy.dtype)
    index = index_HW.to(torch.uint8 if len(ids) <= 256 else torch.int32).cpu().numpy()
    if np.array_equal(ids, np.arange(len(ids))):
        return index.astype(context.taxonomy.dtype, copy=False)
    return np.asarray(ids[index])


def _quality(logits_KHW: Tensor, low_confidence: float) -> Quality:
    log_probability = functional.log_softmax(logits_KHW, dim=0)
    probability = log_probability.exp()
    largest = probability.amax(0)
    entropy = torch.special.entr(probability).sum(0)  # 0 log 0 = 0: a model may rule a class out with -inf
    values = torch.stack([largest.mean(), entropy.mean(), (largest < low_confidence).float().mean()]).cpu().tolist()
    return Quality(*values)


def objects(output: Any, frames: Sequence[Frame], context: PostContext) -> list[Prediction]:
    """Detections in prepared pixels -> the best `max_segments` of at least `score_threshold`, in decoded pixels.

    `output`: per frame a mapping of boxes (N, 4), scores (N), labels (N; category ids), and for masks of their own
    masks (N, 1, M, M).
    """
    predictions = []
    for detection, frame in zip(output, frames, strict=True):
        order = torch.argsort(detection["scores"], descending=True, stable=True)
        order = order[detection["scores"][order] >= context.score_threshold][: context.max_segments]
        scale = torch.tensor(
            [frame.width / frame.prepared_width, frame.height / frame.prepared_height] * 2, dtype=torch.float32
        )
        instances = Instances(
            boxes_N4=(detection["boxes"][order].float().cpu() * scale).numpy(),
            scores_N=detection["scores"][order].float().cpu().numpy(),
            category_ids_N=detection["labels"][order].cpu().numpy().astype(np.int64),
            masks_NMM=detection["masks"][order][:, 0].float().cpu().numpy() if "masks" in detection else None,
        )
        predictions.append(Prediction(instances=instances))
    return predictions


def depth(output: Any, frames: Sequence[Frame], context: PostContext) -> list[Prediction]:
    """depth_B1HW or depth_BHW of a padded batch -> one depth map per frame, bilinear."""
    depth_BHW = output["out"] if isinstance(output, Mapping) else output
    depth_B1HW = depth_BHW[:, None] if depth_BHW.ndim == 3 else depth_BHW
    return [
        depth_from_map(depth_1HW[:, : frame.prepared_height, : frame.prepared_width].float(), frame, context)
        for depth_1HW, frame in zip(depth_B1HW, frames, strict=True)
    ]


def depth_from_map(depth_1HW: Tensor, frame: Frame, context: PostContext) -> Prediction:
    size = (frame.height, frame.width)
    if depth_1HW.shape[1:] != size:
        depth_1HW = functional.interpolate(depth_1HW[None], size=size, mode="bilinear", align_corners=False)[0]
    return Prediction(depth_HW=depth_1HW[0].cpu().numpy(), depth_kind=context.depth_kind)


# Panoptic models differ too much in what they give: each has its own.
POSTPROCESS: dict[Task, Postprocess] = {
    "semantic": semantic,
    "instance": objects,
    "detection": objects,
    "depth": depth,
}
FROM_DENSE: dict[Task, Callable[[Tensor, Frame, PostContext], Prediction]] = {
    "semantic": semantic_from_logits,
    "depth": depth_from_map,
}
