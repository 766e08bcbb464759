"""Examples as the tensors of one forward pass, still in 8 bits: normalising waits for the device.

Axes: B batch, C channels, H rows, W columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.spec import Frame, Preprocess
from pipeline.training.augment import Example
from pipeline.training.targets import torchvision_target

__all__ = ["MicroBatch", "blank_batch", "collate"]

BLANK_PIXELS = 64


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """image_BCHW: uint8, padded on the right and at the bottom. frames: the images' sizes without padding.

    targets: what an Objective reads: `semantic`, `depth`, `pixel_weight`, each (B, H, W). objects: per image what
    torchvision's detectors read. blank: one grey image that counts for nothing, for a worker without a share.
    """

    image_BCHW: Tensor
    frames: tuple[Frame, ...]
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    objects: tuple[Mapping[str, Tensor], ...] = ()
    blank: bool = False

    def to(self, device: torch.device) -> "MicroBatch":
        return self._map(lambda values: values.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """In page-locked memory, from which a copy to a GPU does not hold up the host. Needs a CUDA device."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "MicroBatch":
        return replace(
            self,
            image_BCHW=function(self.image_BCHW),
            targets={name: function(values) for name, values in self.targets.items()},
            objects=tuple({name: function(values) for name, values in item.items()} for item in self.objects),
        )

    def normalised(self, preprocess: Preprocess, memory_format: torch.memory_format) -> Tensor:
        """image_BCHW as the model takes it: float32, 0 where padded (see stages/predict.py)."""
        mean = torch.tensor(preprocess.mean, device=self.image_BCHW.device).view(3, 1, 1) * 255
        std = torch.tensor(preprocess.std, device=self.image_BCHW.device).view(3, 1, 1) * 255
        values = self.image_BCHW.float().sub_(mean).div_(std)
        for value_CHW, frame in zip(values, self.frames, strict=True):
            value_CHW[:, frame.prepared_height :] = 0
            value_CHW[:, :, frame.prepared_width :] = 0
        return values.contiguous(memory_format=memory_format)


def collate(examples: Sequence[Example], preprocess: Preprocess, *, void_id: int) -> MicroBatch:
    """One batch of at least one example. Images of several sizes are padded to the largest height and width."""
    sizes = [(example["image"].shape[-2], example["image"].shape[-1]) for example in examples]
    height, width = preprocess.padded(max(height for height, _ in sizes), max(width for _, width in sizes))
    voids: dict[str, Any] = {"semantic": void_id, "depth": float("nan"), "pixel_weight": 0.0}
    return MicroBatch(
        image_BCHW=torch.stack([_padded(example["image"], height, width, 0) for example in examples]),
        frames=tuple(Frame(height, width, height, width) for height, width in sizes),
        targets={
            name: torch.stack([_padded(example[name], height, width, void) for example in examples])
            for name, void in voids.items()
            if name in examples[0]
        },
        objects=tuple(
            torchvision_target(torch.as_tensor(example["masks"]), example["labels"])
            for example in examples
            if "masks" in example
        ),
    )


def blank_batch(task_targets: Sequence[str], preprocess: Preprocess, *, void_id: int) -> MicroBatch:
    """What a worker without images passes through the model, so that all of them exchange gradients."""
    height, width = preprocess.padded(BLANK_PIXELS, BLANK_PIXELS)
    shape = (1, height, width)
    values = {"semantic": torch.full(shape, void_id), "depth": torch.full(shape, float("nan"))}
    objects = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros((0, height, width), dtype=torch.uint8),
    }
    return MicroBatch(
        image_BCHW=torch.full((1, 3, height, width), 127, dtype=torch.uint8),
        frames=(Frame(height, width, height, width),),
        targets={name: values[name] for name in task_targets if name in values},
        objects=(objects,) if "masks" in task_targets else (),
        blank=True,
    )


def _padded(values: Tensor, height: int, width: int, void: float) -> Tensor:
    plain = values.as_subclass(Tensor)
    rows, columns = height - plain.shape[-2], width - plain.shape[-1]
    return functional.pad(plain, (0, columns, 0, rows), value=void) if rows or columns else plain
