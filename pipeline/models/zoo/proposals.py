"""Where a region-based model looks: selective search, a grid of windows, or the boxes that the source gives.

Axes: B batch, C channels, H rows, W columns, R regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.errors import PredictError
from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame
from pipeline.models.zoo.selective_search import EXTRA, Regions, SearchMode, selective_search

__all__ = ["EXTRA", "ProposalKind", "Proposals", "Proposer", "RawImages", "box_masks", "grid_boxes", "prompt_boxes"]

ProposalKind = Literal["selective_search", "grid", "prompts"]
# Heights of a grid's windows in units of the image's short side, their width over height, and their step in units of
# their own size.
GRID_SIZES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15)
GRID_RATIOS = (1.0, 2.0, 0.5)
GRID_STEP = 0.5


class RawImages(nn.Module):
    """Pixels back from the model's input. The mean and deviation are buffers: a checkpoint remembers them."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[npt.NDArray[np.uint8]]:
        """image_HWC per image, without padding."""
        mean_C11, std_C11 = (value.view(3, 1, 1) for value in (self.get_buffer("mean"), self.get_buffer("std")))
        raw = []
        for image_CHW, frame in zip(image_BCHW.detach().float(), frames, strict=True):
            inside_CHW = image_CHW[:, : frame.prepared_height, : frame.prepared_width]
            pixel_CHW = ((inside_CHW * std_C11 + mean_C11) * 255).round().clamp(0, 255).to(torch.uint8)
            raw.append(np.ascontiguousarray(pixel_CHW.permute(1, 2, 0).cpu().numpy()))
        return raw


@dataclass(frozen=True, slots=True)
class Proposals:
    """Of one image, in prepared pixels. boxes_R4: float32 x1, y1, x2, y2. regions: their shapes, None: boxes alone."""

    boxes_R4: Tensor
    regions: Regions | None = None

    def masks(self, chosen: Sequence[int], height: int, width: int) -> Tensor:
        """masks_N1HW float of some of them: 1 inside the region, or inside the box where it is no more than that."""
        masks_N1HW = torch.zeros(len(chosen), 1, height, width, device=self.boxes_R4.device)
        if self.regions is None:
            return box_masks(self.boxes_R4[list(chosen)], height, width)
        for mask_HW, index in zip(masks_N1HW[:, 0], chosen, strict=True):
            region_HW = torch.from_numpy(self.regions.mask(index))
            mask_HW[: region_HW.shape[0], : region_HW.shape[1]] = region_HW
        return masks_N1HW


def box_masks(boxes_N4: Tensor, height: int, width: int) -> Tensor:
    """masks_N1HW float, 1 inside the box."""
    masks_N1HW = torch.zeros(len(boxes_N4), 1, height, width, device=boxes_N4.device)
    for mask_HW, box in zip(masks_N1HW[:, 0], boxes_N4.round().long().clamp(min=0).tolist(), strict=True):
        x1, y1, x2, y2 = box
        mask_HW[y1:y2, x1:x2] = 1
    return masks_N1HW


class Proposer(nn.Module):
    """Proposals of each image, computed on the CPU from its pixels.

    kind: `selective_search`, `grid`, or `prompts`, the source's boxes; while training, an image without those has a
    grid, from which the model learns what is background. limit: proposals of an image. mode: of selective search.
    mean, std: of the model's normalisation. Raises ValueError for other options, ConfigError where selective search
    lacks the extra `classic`.
    """

    def __init__(
        self, kind: ProposalKind, limit: int, mode: SearchMode, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        if kind not in get_args(ProposalKind) or limit < 1 or mode not in get_args(SearchMode):
            raise ValueError(
                f"proposals must be one of {', '.join(get_args(ProposalKind))}, max_proposals 1 or more, search_mode "
                f"one of {', '.join(get_args(SearchMode))}, got {kind!r}, {limit!r}, {mode!r}"
            )
        if kind == "selective_search":
            import_extra("skimage.segmentation", EXTRA)
        self.kind, self.limit, self.mode = kind, limit, mode
        # Windows seldom overlap an object by a half: without others near it, its own box alone would be an object.
        self.around = 0 if kind == "selective_search" else 8
        self.raw = RawImages(mean, std)

    def forward(self, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[Proposals]:
        """Of each image, on its device; none where the source's boxes are none. Raises PredictError where it has no
        prompts at all, or boxes of which none lies in the image."""
        device = image_BCHW.device
        if self.kind == "selective_search":
            found = [
                selective_search(image_HWC, mode=self.mode, limit=self.limit)
                for image_HWC in self.raw(image_BCHW, frames)
            ]
            return [Proposals(torch.from_numpy(one.boxes_R4).float().to(device), one) for one in found]
        proposals = []
        for frame in frames:
            if self.kind == "grid" or (self.training and not (frame.prompts and frame.prompts.boxes)):
                boxes_R4 = grid_boxes(frame.prepared_height, frame.prepared_width, self.limit)
            else:
                boxes_R4 = prompt_boxes(frame)[: self.limit]
            proposals.append(Proposals(boxes_R4.to(device)))
        return proposals


def grid_boxes(height: int, width: int, limit: int) -> Tensor:
    """boxes_R4 of windows of several sizes and shapes, half over each other, largest first; every so many-th of them
    where there are more than `limit`."""
    short = min(height, width)
    boxes: list[tuple[float, float, float, float]] = []
    for size in GRID_SIZES:
        for ratio in GRID_RATIOS:
            h, w = (min(side * size * short, most) for side, most in ((ratio**-0.5, height), (ratio**0.5, width)))
            tops, lefts = (_starts(whole, part) for whole, part in ((height, h), (width, w)))
            boxes += [(left, top, left + w, top + h) for top in tops for left in lefts]
    boxes = [*dict.fromkeys(boxes)]
    if len(boxes) > limit:
        boxes = [boxes[int(at)] for at in np.linspace(0, len(boxes) - 1, limit)]
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def _starts(whole: int, part: float) -> list[float]:
    steps = int(np.ceil((whole - part) / (GRID_STEP * part)))
    return [float(at) for at in np.linspace(0, whole - part, steps + 1)]


def prompt_boxes(frame: Frame) -> Tensor:
    """boxes_R4 of the source in prepared pixels, within the image; those without an area are left out. Raises
    PredictError where it says nothing of boxes, or all that it says is outside."""
    boxes_R4 = torch.tensor(frame.required_prompts().boxes, dtype=torch.float32).reshape(-1, 4)
    size = torch.tensor([frame.prepared_width, frame.prepared_height] * 2, dtype=torch.float32)
    boxes_R4 = boxes_R4 * size / torch.tensor([frame.width, frame.height] * 2, dtype=torch.float32)
    boxes_R4 = torch.minimum(boxes_R4.clamp(min=0), size)
    inside_R4 = boxes_R4[(boxes_R4[:, 2:] > boxes_R4[:, :2]).all(1)]
    if len(boxes_R4) and not len(inside_R4):
        raise PredictError(
            f"expected box prompts within the image of {frame.width}x{frame.height} pixels, got {len(boxes_R4)} outside"
        )
    return inside_R4
