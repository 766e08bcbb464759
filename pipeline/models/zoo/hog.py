"""Histograms of oriented gradients and a linear classifier that slides over them.

Axes: B batch, C channels, H rows, W columns, N windows, K classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_iou

from pipeline.models.extras import import_extra
from pipeline.models.spec import IMAGENET_MEAN, IMAGENET_STD, Frame
from pipeline.models.zoo.proposals import RawImages
from pipeline.models.zoo.region_heads import Kept

__all__ = ["EXTRA", "HogSVM", "hog_map"]

EXTRA = "classic"
CELL = 8  # pixels; Dalal & Triggs 2005, section 6.4: blocks of 2x2 cells, 9 orientations, L2-Hys
BLOCK = 2
ORIENTATIONS = 9
VALUES = BLOCK * BLOCK * ORIENTATIONS
POSITIVE, NEGATIVE = 0.5, 0.3
HARD_NEGATIVES, FEWEST_NEGATIVES = 10, 50


def hog_map(image_HWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(36, H / 8 - 1, W / 8 - 1): the normalised histograms of every block of 2x2 cells of 8x8 pixels, by
    scikit-image. Raises ConfigError without the extra."""
    feature = import_extra("skimage.feature", EXTRA)
    blocks = feature.hog(
        image_HWC,
        orientations=ORIENTATIONS,
        pixels_per_cell=(CELL, CELL),
        cells_per_block=(BLOCK, BLOCK),
        block_norm="L2-Hys",
        transform_sqrt=True,
        feature_vector=False,
        channel_axis=-1,
    )
    return np.ascontiguousarray(blocks.reshape(*blocks.shape[:2], VALUES).transpose(2, 0, 1), np.float32)


class HogSVM(nn.Module):
    """A detector of Dalal & Triggs 2005 (https://doi.org/10.1109/CVPR.2005.177): for each class a linear support vector
    machine on the histograms of a window, which slides over the image at many scales.

    Its weights are one convolution over the map of blocks. It learns by gradient descent from the hinge loss (with
    weight decay, which is the machine's margin) and, in every step, from the windows that it gets most wrong, where the
    paper solves for them in two rounds.

    window_height, window_width: pixels, multiples of 8. scale_step: from one scale of the image to the next, each
    smaller, until the window no longer fits; an image smaller than the window is continued by its edges. upscale: the
    largest scale. box_score_thresh: of 1 / (1 + exp(-margin)). box_nms_thresh, box_detections_per_img: see Kept. Raises
    ValueError for options that make no sense, ConfigError without the extra `classic`.
    """

    def __init__(
        self,
        num_classes: int,
        window_height: int = 128,
        window_width: int = 64,
        scale_step: float = 1.2,
        upscale: float = 1.0,
        box_score_thresh: float = 0.5,
        box_nms_thresh: float = 0.3,
        box_detections_per_img: int = 100,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        sides = (window_height, window_width)
        if any(side < BLOCK * CELL or side % CELL for side in sides) or scale_step <= 1 or upscale <= 0:
            raise ValueError(
                f"the window's sides must be multiples of {CELL} from {BLOCK * CELL}, scale_step above 1, upscale "
                f"above 0, got {window_height} x {window_width}, {scale_step}, {upscale}"
            )
        import_extra("skimage.feature", EXTRA)
        self.classes, self.window, self.scale_step, self.upscale = num_classes, sides, scale_step, upscale
        self.limits = {"score_thresh": box_score_thresh, "nms_thresh": box_nms_thresh}
        self.detections = box_detections_per_img
        self.raw = RawImages(mean, std)
        blocks = [side // CELL - BLOCK + 1 for side in sides]
        self.margin = nn.Conv2d(VALUES, num_classes, (blocks[0], blocks[1]))
        nn.init.normal_(self.margin.weight, std=0.01)
        nn.init.constant_(self.margin.get_parameter("bias"), -0.5)  # nothing is an object before one was seen

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Sizes at which the window is slid over an image, largest first; it may not fit into the first."""
        least = max(self.window[0] / height, self.window[1] / width)
        scales = [self.upscale]
        while scales[-1] / self.scale_step >= least:
            scales.append(scales[-1] / self.scale_step)
        return [(max(round(height * scale), 1), max(round(width * scale), 1)) for scale in scales]

    def windows(self, image_HWC: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """margin_NK of every window of one image, and boxes_N4 in its pixels."""
        height, width = image_HWC.shape[:2]
        image_1CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
        device = self.margin.weight.device
        margins, boxes = [], []
        for rows, columns in self.sizes(height, width):
            resized = image_1CHW.float()
            if (rows, columns) != (height, width):
                resized = functional.interpolate(resized, size=(rows, columns), mode="bilinear", antialias=True)
            missing = [max(window - side, 0) for window, side in zip(self.window, (rows, columns), strict=True)]
            resized = functional.pad(resized, (0, missing[1], 0, missing[0]), mode="replicate")
            pixel_HWC = resized[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
            blocks_CHW = torch.from_numpy(hog_map(pixel_HWC)).to(device)
            margin_KHW = self.margin(blocks_CHW[None])[0]
            top, left = (torch.arange(count, device=device) * float(CELL) for count in margin_KHW.shape[1:])
            corner_N2 = torch.stack(torch.meshgrid(left, top, indexing="xy"), 2).flatten(0, 1)
            box_N4 = torch.cat([corner_N2, corner_N2 + corner_N2.new_tensor([self.window[1], self.window[0]])], 1)
            margins.append(margin_KHW.flatten(1).T.float())
            boxes.append(box_N4 * box_N4.new_tensor([width / columns, height / rows] * 2))
        return torch.cat(margins), torch.cat(boxes)

    def forward(self, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
        """Per image boxes (N, 4) in prepared pixels, scores and labels (N; places), best first."""
        found = []
        for image_HWC, frame in zip(self.raw(image_BCHW, frames), frames, strict=True):
            margin_NK, boxes_N4 = self.windows(image_HWC)
            kept = Kept.of(
                margin_NK.sigmoid(),
                boxes_N4[:, None].expand(-1, self.classes, -1),
                (frame.prepared_height, frame.prepared_width),
                limit=self.detections,
                **self.limits,
            )
            found.append(kept.as_detection())
        return found

    def losses(
        self, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`loss_hinge`: max(0, 1 - y margin) with y = 1 for the window's class and -1 for the others; mean over windows
        of a class, then over the positive and the negative halves, the classes and the images.

        A window has the object that it overlaps by 0.5 or more, and every object the window that overlaps it most;
        below 0.3 it has none, and of those the ones with the largest margins are learned from.
        """
        total = self.margin.get_parameter("bias").sum() * 0
        for image_HWC, target in zip(self.raw(image_BCHW, frames), targets, strict=True):
            margin_NK, boxes_N4 = self.windows(image_HWC)
            class_N, background_N = self._assigned(boxes_N4, target)
            for place in range(self.classes):
                margin_N = margin_NK[:, place]
                positive_N = margin_N[class_N == place]
                negative_N = margin_N[background_N | ((class_N >= 0) & (class_N != place))]
                count = min(len(negative_N), max(FEWEST_NEGATIVES, HARD_NEGATIVES * len(positive_N)))
                halves = [functional.relu(1 + negative_N.topk(count).values), functional.relu(1 - positive_N)]
                present = [half.mean() for half in halves if len(half)]
                total = total + sum(present, total * 0) / max(len(present), 1) / self.classes / len(targets)
        return {"loss_hinge": total}

    def _assigned(self, boxes_N4: Tensor, target: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each window's class, -1 for none; and whether it is background."""
        objects_M4, labels_M = target["boxes"].to(boxes_N4), target["labels"].to(boxes_N4.device)
        class_N = torch.full((len(boxes_N4),), -1, dtype=torch.int64, device=boxes_N4.device)
        if not len(objects_M4):
            return class_N, class_N < 0
        overlap_NM = box_iou(boxes_N4, objects_M4)
        overlap_N, nearest_N = overlap_NM.max(1)
        class_N = torch.where(overlap_N >= POSITIVE, labels_M[nearest_N], class_N)
        class_N[overlap_NM.argmax(0)] = labels_M
        return class_N, (overlap_N < NEGATIVE) & (class_N < 0)
