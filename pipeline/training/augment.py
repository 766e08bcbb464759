"""Augmentation: what happens to one image is drawn once, from its id, and applied to the image and all of its targets.

The draws are bytes of a hash of (seed, epoch, image_id): they are the same in any order, on any worker and in any
process, and nothing is read from or left in a global generator.

Axes: C channels, H rows, W columns, N instances.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from pipeline.errors import ConfigError, TargetMismatchError
from pipeline.models.spec import Preprocess
from pipeline.training.losses.semantic import VOID

__all__ = ["AugmentOptions", "Change", "Example", "apply_change", "augment", "draw_change", "make_example", "resize"]

# One image and its targets: `image` (tv_tensors.Image, 3, H, W, uint8), and any of `semantic` (class indices, H, W),
# `panoptic` (segment ids, 0 = void, H, W), `depth` (float32 metres, NaN = unknown, H, W), `masks` (N, H, W, uint8), all
# tv_tensors.Mask, with `labels` (N) beside masks. `pixel_weight` (float32, H, W) is made after augmentation.
Example = dict[str, Tensor]
Padding = Literal["void", "mirror"]

DRAWS = 8
IMAGENET_MEAN_RGB = (124, 116, 104)


@dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """The defaults change nothing.

    resize, max_size: the size that `scale` is relative to, as in a model's Preprocess (short side; bound of the long
        side; pixels). scale: range of a uniform factor on that size.
    crop: height and width of what comes out, at a place drawn evenly; None: the whole image. An image that is smaller
        is padded on both sides, by `pad`: `void` (`fill`, and targets without evidence) or `mirror` (image and targets
        reflected about their outermost pixels, as U-Net's input).
    fill: red, green, blue of void padding; ImageNet's mean becomes 0 when normalised.
    flip: probability of left to right. brightness, contrast, saturation: b draws a factor from [1 - b, 1 + b];
        hue: h draws a shift from [-h, h] of the colour circle, at most 0.5.
    zoom_depth: divide depth by the factor drawn from `scale`, as if the camera had come closer by it (Eigen et al.
        2014, arXiv:1406.2283, on data augmentation). By default metric depth stays as it is, however the image is
        resized: a larger picture of a thing does not bring it nearer.
    void_id: of semantic targets, the taxonomy's.
    """

    resize: int | None = None
    max_size: int | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int] | None = None
    pad: Padding = "void"
    fill: tuple[int, int, int] = IMAGENET_MEAN_RGB
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    zoom_depth: bool = False
    void_id: int = VOID

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high < float("inf"):
            raise ConfigError(f"scale must be two finite factors over 0 in ascending order, got {self.scale}")
        if self.crop is not None and min(self.crop) < 1:
            raise ConfigError(f"crop must be height and width of 1 or more, got {self.crop}")
        if self.pad not in ("void", "mirror"):
            raise ConfigError(f"pad must be void or mirror, got {self.pad!r}")
        for name, limit in (("flip", 1.0), ("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= limit:
                raise ConfigError(f"{name} must be 0 to {limit}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happens to one image. top, left, height, width: the window that is cut out, in the image's pixels; it may
    reach beyond the image. out_height, out_width: what the window is resized to. zoom: what was drawn from `scale`."""

    top: int
    left: int
    height: int
    width: int
    out_height: int
    out_width: int
    zoom: float = 1.0
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


def make_example(
    image_HWC: npt.NDArray[np.uint8],
    *,
    semantic_HW: npt.NDArray[Any] | None = None,
    panoptic_HW: npt.NDArray[Any] | None = None,
    depth_HW: npt.NDArray[Any] | None = None,
    masks_NHW: Tensor | None = None,
    labels_N: Tensor | None = None,
) -> Example:
    """One image with its targets, decoded. Ids must be under 2**24. Raises TargetMismatchError where sizes differ."""
    image_CHW = torch.from_numpy(np.require(image_HWC, requirements=["C", "W"])).permute(2, 0, 1)
    example: Example = {"image": tv_tensors.Image(image_CHW)}
    for name, map_HW, dtype in (
        ("semantic", semantic_HW, None),
        ("panoptic", panoptic_HW, np.int32),
        ("depth", depth_HW, np.float32),
    ):
        if map_HW is not None:
            # A signed type for 16 bits: torch has next to no operations on uint16.
            wanted = dtype or (np.uint8 if map_HW.dtype == np.uint8 else np.int32)
            example[name] = tv_tensors.Mask(torch.from_numpy(np.require(map_HW, wanted, ["C", "W"])))
    if masks_NHW is not None and labels_N is not None:
        example |= {"masks": tv_tensors.Mask(masks_NHW), "labels": labels_N}
    height, width = image_HWC.shape[:2]
    for name, values in _maps(example).items():
        if values.shape[-2:] != (height, width):
            got = "x".join(map(str, reversed(values.shape[-2:])))
            raise TargetMismatchError(f"expected the target ({name}) to be {width}x{height} as the image, got {got}")
    return example


def augment(example: Example, options: AugmentOptions, *, seed: int, epoch: int, image_id: str) -> Example:
    """A new example, the same for the same arguments; `example` stays as it is."""
    height, width = example["image"].shape[-2:]
    change = draw_change(options, height, width, seed=seed, epoch=epoch, image_id=image_id)
    return apply_change(example, change, options)


def draw_change(options: AugmentOptions, height: int, width: int, *, seed: int, epoch: int, image_id: str) -> Change:
    """What happens to an image of that size. Every option has draws of its own, so that changing one moves no other."""
    scale, top, left, flip, brightness, contrast, saturation, hue = _draws(seed, epoch, image_id)
    base_height, base_width = Preprocess(resize=options.resize, max_size=options.max_size).size(height, width)
    low, high = options.scale
    zoom = low + (high - low) * scale
    if options.crop is None:
        window_height, window_width = height, width
        out_height, out_width = (max(1, round(size * zoom)) for size in (base_height, base_width))
    else:
        # The window is cut before it is resized, to save resizing what is not in it. Its sides are whole pixels, so the
        # zoom is exact to half a pixel of the window.
        out_height, out_width = options.crop
        window_height = max(1, round(out_height * height / (base_height * zoom)))
        window_width = max(1, round(out_width * width / (base_width * zoom)))
    return Change(
        top=_place(top, height, window_height),
        left=_place(left, width, window_width),
        height=window_height,
        width=window_width,
        out_height=out_height,
        out_width=out_width,
        zoom=zoom,
        flip=flip < options.flip,
        brightness=1 + options.brightness * (2 * brightness - 1),
        contrast=1 + options.contrast * (2 * contrast - 1),
        saturation=1 + options.saturation * (2 * saturation - 1),
        hue=options.hue * (2 * hue - 1),
    )


def apply_change(example: Example, change: Change, options: AugmentOptions) -> Example:
    """The image and all of its targets after one change; instances that have no pixel left are dropped.

    Raises ConfigError for mirror padding of instance masks: a reflected object is another one.
    """
    if "masks" in example and options.pad == "mirror" and not _is_inside(change, example["image"]):
        raise ConfigError("instances cannot be padded by mirroring; use pad: void")
    changed = {
        name: _resized(name, _cut(name, values, change, options), change.out_height, change.out_width)
        for name, values in ({"image": example["image"]} | _maps(example)).items()
    }
    if change.flip:
        changed = {name: transforms.horizontal_flip(values) for name, values in changed.items()}
    changed["image"] = _colored(changed["image"], change)
    if options.zoom_depth and "depth" in changed:
        changed["depth"] = tv_tensors.Mask(changed["depth"] / change.zoom)
    return _with_labels(changed, example)


def resize(example: Example, height: int, width: int) -> Example:
    """Image and targets at another size and nothing else: for validation at a model's own size."""
    changed = {
        name: _resized(name, values, height, width)
        for name, values in ({"image": example["image"]} | _maps(example)).items()
    }
    return _with_labels(changed, example)


def _draws(seed: int, epoch: int, image_id: str) -> list[float]:
    """Eight numbers, evenly spread over [0, 1): a digest has eight times eight bytes, a float takes 53 bits."""
    digest = hashlib.blake2b(json.dumps([seed, epoch, image_id]).encode(), digest_size=8 * DRAWS).digest()
    return [(int.from_bytes(digest[8 * at : 8 * at + 8], "little") >> 11) * 2.0**-53 for at in range(DRAWS)]


def _place(draw: float, size: int, window: int) -> int:
    """Where a window begins: anywhere inside the image, or, where it is larger, anywhere around it."""
    first, last = min(0, size - window), max(0, size - window)
    return first + int(draw * (last - first + 1))


def _is_inside(change: Change, values: Tensor) -> bool:
    height, width = values.shape[-2:]
    return min(change.top, change.left) >= 0 and (
        change.top + change.height <= height and change.left + change.width <= width
    )


def _cut(name: str, values: Tensor, change: Change, options: AugmentOptions) -> Tensor:
    """The change's window, padded where it reaches beyond the image."""
    height, width = values.shape[-2:]
    bottom, right = change.top + change.height, change.left + change.width
    if _is_inside(change, values):
        return values[..., change.top : bottom, change.left : right]
    if options.pad == "mirror":
        rows = _mirrored(torch.arange(change.top, bottom), height)
        columns = _mirrored(torch.arange(change.left, right), width)
        return values.index_select(-2, rows).index_select(-1, columns)
    window = _void(name, values, options).expand(*values.shape[:-2], change.height, change.width).clone()
    # The part of the image that the window shows, unless it misses it altogether.
    top, left = max(0, change.top), max(0, change.left)
    below, beside = min(height, bottom), min(width, right)
    if below > top and beside > left:
        part = values[..., top:below, left:beside]
        window[..., top - change.top : below - change.top, left - change.left : beside - change.left] = part
    return window


def _mirrored(places: Tensor, size: int) -> Tensor:
    """Places on an endless line of reflections about the first and the last pixel, as places 0..size-1."""
    period = max(1, 2 * (size - 1))
    folded = places.remainder(period)
    return torch.minimum(folded, period - folded) if size > 1 else torch.zeros_like(places)


def _void(name: str, values: Tensor, options: AugmentOptions) -> Tensor:
    """What stands for no evidence, of the type of `values` and broadcastable to it."""
    if name == "image":
        return torch.tensor(options.fill, dtype=values.dtype)[:, None, None]
    void = {"semantic": options.void_id, "depth": float("nan")}.get(name, 0)
    return torch.tensor(void, dtype=values.dtype)


def _resized(name: str, values: Tensor, height: int, width: int) -> Tensor:
    """Images bilinearly with a low-pass filter, targets by the nearest pixel: the mean of two ids is a third, and that
    of two depths lies on neither surface. The nearest is that to a pixel's centre; torchvision's own resizing of masks
    takes the one to its upper left, and shrinking by 4 leaves them 1.5 pixels off their image."""
    if values.shape[-2:] != (height, width):
        if name == "image":
            values = transforms.resize_image(values, [height, width], antialias=True)
        else:
            stacked = values.reshape(-1, *values.shape[-2:])
            nearest = transforms.resize_image(stacked, [height, width], interpolation=InterpolationMode.NEAREST_EXACT)
            values = nearest.reshape(*values.shape[:-2], height, width)
    wrapped: Tensor = (tv_tensors.Image if name == "image" else tv_tensors.Mask)(values)
    return wrapped


def _colored(image_CHW: Tensor, change: Change) -> Tensor:
    """In a fixed order; what is left as it is costs nothing."""
    for adjust, amount, neutral in (
        (transforms.adjust_brightness, change.brightness, 1.0),
        (transforms.adjust_contrast, change.contrast, 1.0),
        (transforms.adjust_saturation, change.saturation, 1.0),
        (transforms.adjust_hue, change.hue, 0.0),
    ):
        if amount != neutral:
            image_CHW = adjust(image_CHW, amount)
    return image_CHW


def _maps(example: Mapping[str, Tensor]) -> Example:
    """The targets that have rows and columns."""
    return {name: values for name, values in example.items() if name not in ("image", "labels")}


def _with_labels(changed: Example, example: Mapping[str, Tensor]) -> Example:
    """Instances that still have a pixel, with their labels."""
    if "masks" in changed:
        kept_N = (changed["masks"] != 0).flatten(1).any(1)
        changed["masks"] = tv_tensors.Mask(changed["masks"][kept_N])
        changed["labels"] = example["labels"][kept_N]
    return changed
