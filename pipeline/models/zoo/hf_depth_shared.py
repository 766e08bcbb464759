"""What the models of depth from transformers share: parts left out or drawn anew, names of weights, images without
padding, and depth at the image's size.

Axes: B batch, N images of one size, C channels, H rows, W columns.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.spec import Frame, PostContext, Prediction

__all__ = [
    "DEPTH_KINDS",
    "EXTRA",
    "UNUSED_FUSION",
    "bicubic_depth",
    "by_size",
    "check_depth_kind",
    "check_layers",
    "check_multiple",
    "disparity_resized",
    "draw_anew",
    "leave_out",
    "renamed",
    "without",
]

EXTRA = "hf"
DEPTH_KINDS = ("inverse_relative", "metric_m")
# The first fusion has nothing to fuse with: DistributedDataParallel would wait for this unit's gradients.
UNUSED_FUSION = "neck.fusion_stage.layers.0.residual_layer1"

Rename = tuple[str, str]
Run = Callable[[Tensor, Frame], Tensor]


def check_depth_kind(depth_kind: str) -> None:
    """Raise ValueError for a kind of depth that no head here gives."""
    if depth_kind not in DEPTH_KINDS:
        raise ValueError(f"depth_kind must be inverse_relative or metric_m, got {depth_kind!r}")


def check_layers(out_layers: Sequence[int], layers: int, neck_sizes: Sequence[int], count: int = 4) -> None:
    """Raise ValueError unless `out_layers` are `count` layers from the first to the last, each with a size."""
    if list(out_layers) != sorted(set(out_layers)) or out_layers[0] < 0 or out_layers[-1] != layers - 1:
        raise ValueError(f"out_layers must ascend from 0 or more to the last layer, {layers - 1}, got {out_layers}")
    if len(out_layers) != count or len(neck_sizes) != count:
        number = {2: "two", 4: "four"}[count]
        raise ValueError(f"out_layers and neck_sizes must be {number} each, got {out_layers} and {neck_sizes}")


def check_multiple(image_BCHW: Tensor, step: int) -> tuple[int, int]:
    """The input's height and width. Raises ValueError unless they are multiples of `step`."""
    height, width = image_BCHW.shape[-2:]
    if height % step or width % step:
        raise ValueError(f"height and width must be multiples of {step}, got {height} x {width} (pad_multiple)")
    return height, width


def leave_out(module: nn.Module, names: Iterable[str]) -> None:
    """Put nothing in the place of submodules that the library builds and the output does not depend on."""
    for unused in names:
        parent, _, name = unused.rpartition(".")
        setattr(module.get_submodule(parent), name, nn.Identity())


def draw_anew(*parts: nn.Module) -> None:
    """Draw the weights of convolutions and linear layers as torch does by default.

    As in the authors' code: transformers' own (a deviation of 0.02 everywhere) make a small decoder's output vanish.
    """
    for part in parts:
        for child in part.modules():
            if isinstance(child, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                child.reset_parameters()


def without(given: Mapping[str, Tensor], wanted: Set[str], unused: tuple[str, ...]) -> dict[str, Tensor]:
    """A checkpoint without the tensors below `unused` that the module lacks."""
    return {name: tensor for name, tensor in given.items() if name in wanted or not name.startswith(unused)}


def renamed(given: Mapping[str, Tensor], wanted: Set[str], renames: Sequence[Rename]) -> dict[str, Tensor]:
    """A checkpoint under the module's names, where versions of the library name the same tensor differently.

    renames: regular expressions and replacements, from the published names to those of transformers 5; a name of the
    one kind or the other becomes what the installed version calls it. Unknown names stay as they are.
    """

    def known(name: str) -> str:
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        return name

    places = {known(name): name for name in wanted}
    return {places.get(known(name), name): tensor for name, tensor in given.items()}


def by_size(run: Run, image_BCHW: Tensor, frames: Sequence[Frame], *, alone: bool = False) -> Tensor:
    """depth_BHW of the input's size: `run` on images without their padding, those of one size together.

    run: depth_NHW of an image_NCHW and the frame that they share. alone: every image by itself. The padding's depth
    is 0.
    """
    height, width = image_BCHW.shape[-2:]
    groups: dict[tuple[int, ...], list[int]] = {}
    for at, frame in enumerate(frames):
        key = (frame.height, frame.width, frame.prepared_height, frame.prepared_width, at if alone else 0)
        groups.setdefault(key, []).append(at)
    depths: dict[int, Tensor] = {}
    for places in groups.values():
        frame = frames[places[0]]
        rows, columns = frame.prepared_height, frame.prepared_width
        depth_NHW = run(image_BCHW[places, :, :rows, :columns], frame)
        padded_NHW = functional.pad(depth_NHW, (0, width - columns, 0, height - rows))
        depths.update(zip(places, padded_NHW, strict=True))
    return torch.stack([depths[at] for at in range(len(frames))])


def bicubic_depth(output: Any, frames: Sequence[Frame], context: PostContext) -> list[Prediction]:
    """depth_BHW of a padded batch -> one depth map per frame, bicubic as transformers' image processors resize it.

    Not below 0, where bicubic weights can lead, and the shift of a tile.
    """

    def resized(depth_11HW: Tensor, size: tuple[int, int]) -> Tensor:
        return functional.interpolate(depth_11HW, size=size, mode="bicubic", align_corners=False)

    predictions = _at_image_size(output, frames, context, resized)
    return [replace(one, depth_HW=None if one.depth_HW is None else one.depth_HW.clip(0)) for one in predictions]


def disparity_resized(output: Any, frames: Sequence[Frame], context: PostContext) -> list[Prediction]:
    """Metres, depth_BHW above 0, of a padded batch -> one depth map per frame; it is 1 / depth that is interpolated
    (bilinear), as in the authors' code of Depth Pro."""

    def resized(depth_11HW: Tensor, size: tuple[int, int]) -> Tensor:
        return 1 / functional.interpolate(1 / depth_11HW, size=size, mode="bilinear", align_corners=False)

    return _at_image_size(output, frames, context, resized)


def _at_image_size(
    output: Any,
    frames: Sequence[Frame],
    context: PostContext,
    resized: Callable[[Tensor, tuple[int, int]], Tensor],
) -> list[Prediction]:
    predictions = []
    for depth_HW, frame in zip(output, frames, strict=True):
        depth_11HW = depth_HW[None, None, : frame.prepared_height, : frame.prepared_width].float()
        if depth_11HW.shape[2:] != (frame.height, frame.width):
            depth_11HW = resized(depth_11HW, (frame.height, frame.width))
        predictions.append(Prediction(depth_HW=depth_11HW[0, 0].cpu().numpy(), depth_kind=context.depth_kind))
    return predictions
