"""Labels, masks and depth drawn as colours: what the contact sheet and the report's pictures share."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pipeline.taxonomy import Taxonomy

__all__ = [
    "Color",
    "Rgb",
    "blend_colors",
    "blend_labels",
    "blend_masks",
    "color_depth",
    "color_ramp",
    "draw_boxes",
    "outline",
]

Rgb = npt.NDArray[np.uint8]  # (H, W, 3)
Color = Sequence[int] | npt.NDArray[Any]
Flags = npt.NDArray[np.bool_]

MAP_ALPHA = 0.6
MASK_ALPHA = 0.5
BORDER_ALPHA = 0.6
# Anchors of a perceptual ramp from far (dark violet) to near (yellow), after matplotlib's plasma.
DEPTH_RAMP = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33))


def blend_labels(image_HWC: Rgb, label_HW: npt.NDArray[Any], taxonomy: Taxonomy) -> Rgb:
    """Class colours over a dimmed gray image, class borders in white."""
    return blend_colors(image_HWC, taxonomy.palette[np.minimum(label_HW, taxonomy.void_id)], label_HW)


def blend_colors(image_HWC: Rgb, colors_HWC: Rgb, region_HW: npt.NDArray[Any]) -> Rgb:
    """Colours over a dimmed gray image, white where the value of region_HW changes. All of one size."""
    gray_HW1 = image_HWC.mean(axis=2, keepdims=True)
    blended = colors_HWC.astype(np.float32) * MAP_ALPHA + gray_HW1 * (1 - MAP_ALPHA)
    border_HW = np.zeros(region_HW.shape, bool)
    border_HW[:, 1:] |= region_HW[:, 1:] != region_HW[:, :-1]
    border_HW[1:] |= region_HW[1:] != region_HW[:-1]
    blended[border_HW] = blended[border_HW] * (1 - BORDER_ALPHA) + 255 * BORDER_ALPHA
    return np.asarray(blended, np.uint8)


def blend_masks(image_HWC: Rgb, masks: Iterable[tuple[Flags, Color]]) -> Rgb:
    """Masks in their colour with a white outline; the last lies on top."""
    blended = image_HWC.astype(np.float32)
    for mask_HW, color in masks:
        blended[mask_HW] = blended[mask_HW] * (1 - MASK_ALPHA) + np.asarray(color, np.float32) * MASK_ALPHA
        blended[outline(mask_HW)] = 255
    return blended.astype(np.uint8)


def draw_boxes(image_HWC: Rgb, boxes: Iterable[tuple[Sequence[float], Color]]) -> Rgb:
    """Outlines of boxes (x, y, w, h in pixels of the image) in their colour; the last lies on top."""
    picture = Image.fromarray(image_HWC)
    draw = ImageDraw.Draw(picture)
    for (x, y, w, h), color in boxes:
        if w >= 0 and h >= 0:
            draw.rectangle((x, y, x + w, y + h), outline=tuple(int(value) for value in color), width=2)
    return np.asarray(picture)


def outline(mask_HW: Flags) -> Flags:
    """The mask's pixels beside what is not in it; the picture's edge is no border."""
    inner_HW = mask_HW.copy()
    inner_HW[1:] &= mask_HW[:-1]
    inner_HW[:-1] &= mask_HW[1:]
    inner_HW[:, 1:] &= mask_HW[:, :-1]
    inner_HW[:, :-1] &= mask_HW[:, 1:]
    return mask_HW & ~inner_HW


def color_depth(depth_HW: npt.NDArray[np.floating[Any]], span: tuple[float, float] | None = None) -> Rgb:
    """Depth by colour, near is bright; black where it is not finite. span: the depths of both ends of the ramp, by
    default the 2nd and 98th percentile."""
    valid_HW = np.isfinite(depth_HW)
    colors_HWC = np.zeros((*depth_HW.shape, 3), np.uint8)
    if valid_HW.any():
        low, high = np.percentile(depth_HW[valid_HW], [2, 98]) if span is None else span
        nearness = 1 - (depth_HW[valid_HW] - low) / max(high - low, 1e-9)
        colors_HWC[valid_HW] = color_ramp(nearness, DEPTH_RAMP)
    return colors_HWC


def color_ramp(values: npt.NDArray[np.floating[Any]], anchors: Sequence[Sequence[int]]) -> npt.NDArray[np.uint8]:
    """Values of 0 to 1 (clipped) as colours between evenly spaced anchors, (..., 3)."""
    places = np.linspace(0, 1, len(anchors))
    channels = [np.interp(values, places, [color[channel] for color in anchors]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)
