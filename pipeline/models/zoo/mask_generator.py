"""All masks of an image from a promptable model: a grid of points as prompts, and what is worth keeping of the answers.

Section 5 and appendix B of Segment Anything (Kirillov et al. 2023, https://arxiv.org/abs/2304.02643). Images are
embedded a batch at a time. A mask is decoded at a quarter of the model's input and stays so until it has passed every
test; at the image's own size there are only a few at a time.

Axes: B batch, C channels, H rows, W columns, M rows and columns of a low-resolution mask, N masks, P prompts, K masks
per prompt, S rows and columns of the model's input.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import batched_nms, nms

from pipeline.masks import encode_rle
from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame

__all__ = [
    "MASK_THRESHOLD",
    "Embedding",
    "Enlarging",
    "GridOptions",
    "Promptable",
    "Segments",
    "crop_boxes",
    "enlarged",
    "fill_and_clean",
    "generate",
    "segments_of",
    "takes_grid",
    "views",
]

Built = TypeVar("Built")
Box = tuple[int, int, int, int]
Embedding = Sequence[Tensor]
# What `generate` says of one image: see `segments_of`.
Segments = dict[str, Tensor]

# Logits above it are inside.
MASK_THRESHOLD = 0.0
# In pixels of the image: a mask that ends this near to the edge of a crop is taken to go on behind it.
EDGE = 20.0
# Points decoded at once on a CPU: what they need stays in its caches, which saves a fifth of the time.
CPU_POINTS = 16
# Values of full-size logits that exist at one time, 64 MB.
CHUNK_VALUES = 1 << 24


class Enlarging(Protocol):
    """A model whose masks are enlarged from the resolution of its mask head."""

    image_size: int

    def enlarge(self, logits_NMM: Tensor, height: int, width: int) -> Tensor:
        """logits_NHW, at the size of the image that was looked at."""
        ...


class Promptable(Enlarging, Protocol):
    """A model that embeds images, and decodes masks from prompts of one embedding."""

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the square input that an image of this size covers."""
        ...

    def embed(self, image_BCSS: Tensor) -> list[Embedding]:
        """The embedding of each image, a batch of one."""
        ...

    def decode(
        self,
        embedding: Embedding,
        *,
        points_PK2: Tensor | None = None,
        labels_PK: Tensor | None = None,
        boxes_P4: Tensor | None = None,
        several: bool,
    ) -> tuple[Tensor, Tensor]:
        """logits_PKMM and the predicted IoU_PK, for prompts in pixels of the input. several: or one mask each."""
        ...


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """How masks are looked for. Raises ValueError for what makes no sense.

    points_per_side: of the grid over the whole image. points_per_batch: prompts that are decoded at once, which bounds
    the memory. crop_layers: layer i looks at 2**i x 2**i crops as well, which overlap by crop_overlap / 2**(i - 1) of
    the short side and have points_per_side / crop_points_downscale**i points a side. pred_iou_thresh,
    stability_score_thresh: a mask needs more than that of what the model says of its IoU, and of the IoU between its
    logits cut at +stability_score_offset and at -stability_score_offset. box_nms_thresh, crop_nms_thresh: IoU of the
    boxes of two masks above which one of them goes, within a crop (the one of lower predicted IoU) and between crops
    (the one of the larger crop). min_area: islands and holes of fewer pixels are taken out; 0 leaves them.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    crop_layers: int = 0
    crop_overlap: float = 512 / 1500
    crop_points_downscale: int = 1
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_nms_thresh: float = 0.7
    min_area: int = 0

    def __post_init__(self) -> None:
        for name in ("points_per_side", "points_per_batch", "crop_points_downscale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("crop_layers", "min_area", "stability_score_offset"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.crop_layers > 4:
            raise ValueError(f"crop_layers must be 4 or less (4 are 341 views of an image), got {self.crop_layers}")
        for name in ("crop_overlap", "box_nms_thresh", "crop_nms_thresh"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")

    def points_of(self, layer: int) -> int:
        """Points a side of each crop of a layer."""
        return max(1, int(self.points_per_side / self.crop_points_downscale**layer))


def takes_grid(defaults: GridOptions) -> Callable[[Callable[..., Built]], Callable[..., Built]]:
    """Decorates a `build` that has a parameter `grid`: what is built, and its signature, has the fields of GridOptions
    as options of their own in its place, with these defaults."""
    names = [field.name for field in dataclasses.fields(GridOptions)]

    def decorate(build: Callable[..., Built]) -> Callable[..., Built]:
        @functools.wraps(build)
        def built(*arguments: Any, **options: Any) -> Built:
            own = {name: options.pop(name) for name in names if name in options}
            return build(*arguments, **options, grid=dataclasses.replace(defaults, **own))

        signature = inspect.signature(build)
        parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "grid"]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(defaults, name)) for name in names
        ]
        built.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return built

    return decorate


@dataclass(frozen=True)
class _Candidates:
    """Masks of one crop that passed the tests, at low resolution. boxes_N4: x1, y1, x2, y2 of the image's pixels, the
    last ones included."""

    crop: Box
    logits_NMM: Tensor
    scores_N: Tensor
    boxes_N4: Tensor

    def kept(self, places: Tensor) -> "_Candidates":
        return _Candidates(self.crop, self.logits_NMM[places], self.scores_N[places], self.boxes_N4[places])


def crop_boxes(height: int, width: int, layers: int, overlap: float) -> list[tuple[int, Box]]:
    """Layer and box (x1, y1, x2, y2; pixels) of each crop, the whole image first; crops of a layer column by column."""
    boxes: list[tuple[int, Box]] = [(0, (0, 0, width, height))]
    for layer in range(1, layers + 1):
        count = 2**layer
        shared = int(overlap * min(height, width) * 2 / count)
        w, h = (math.ceil((shared * (count - 1) + side) / count) for side in (width, height))
        for column, row in product(range(count), repeat=2):
            left, top = (w - shared) * column, (h - shared) * row
            boxes.append((layer, (left, top, min(left + w, width), min(top + h, height))))
    return boxes


def views(model: Promptable, image_BCHW: Tensor, frames: Sequence[Frame], crops: Sequence[tuple[int, Box]]) -> Tensor:
    """Inputs image_BCSS: of each (place in the batch, crop in decoded pixels) what lies in the crop, resized to fill
    the input's sides as `fit` has it, and zeros. Prepared pixels are taken as they are where they fit already."""
    size = model.image_size
    filled = image_BCHW.new_zeros((len(crops), image_BCHW.shape[1], size, size))
    for view_CSS, (place, (left, top, right, bottom)) in zip(filled, crops, strict=True):
        frame = frames[place]
        fx, fy = frame.prepared_width / frame.width, frame.prepared_height / frame.height
        x1, y1 = min(round(left * fx), frame.prepared_width - 1), min(round(top * fy), frame.prepared_height - 1)
        x2, y2 = max(round(right * fx), x1 + 1), max(round(bottom * fy), y1 + 1)
        part_CHW = image_BCHW[place, :, y1:y2, x1:x2]
        rows, columns = model.fit(bottom - top, right - left)
        if part_CHW.shape[1:] != (rows, columns):
            part_CHW = functional.interpolate(part_CHW[None], (rows, columns), mode="bilinear", antialias=True)[0]
        view_CSS[:, :rows, :columns] = part_CHW
    return filled


def generate(model: Promptable, image_BCHW: Tensor, frames: Sequence[Frame], options: GridOptions) -> list[Segments]:
    """The masks of each image (`segments_of`), the best first. image_BCHW: of prepared images, normalised, padded."""
    jobs = [
        (place, layer, box)
        for place, frame in enumerate(frames)
        for layer, box in crop_boxes(frame.height, frame.width, options.crop_layers, options.crop_overlap)
    ]
    found: list[list[_Candidates]] = [[] for _ in frames]
    for first in range(0, len(jobs), len(frames)):
        part = jobs[first : first + len(frames)]
        embeddings = model.embed(views(model, image_BCHW, frames, [(place, box) for place, _, box in part]))
        for (place, layer, box), embedding in zip(part, embeddings, strict=True):
            found[place].append(_look(model, embedding, frames[place], box, options.points_of(layer), options))
    return [_finish(model, candidates, frame, options) for candidates, frame in zip(found, frames, strict=True)]


def point_grid(count: int, device: torch.device) -> Tensor:
    """points_N2 (x, y), `count` a side, the middles of as many cells of the unit square; row by row."""
    middles = torch.linspace(1 / (2 * count), 1 - 1 / (2 * count), count, device=device)
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def _look(
    model: Promptable, embedding: Embedding, frame: Frame, crop: Box, points_per_side: int, options: GridOptions
) -> _Candidates:
    """Masks of one crop from its grid of points, after the tests and the crop's own suppression."""
    left, top, right, bottom = crop
    height, width = bottom - top, right - left
    rows, columns = model.fit(height, width)
    # From the unit square through the crop's pixels to the input's, as the processor does with a user's points.
    points_N2 = point_grid(points_per_side, embedding[0].device)
    points_N2 = (
        points_N2 * points_N2.new_tensor([width, height]) * points_N2.new_tensor([columns / width, rows / height])
    )
    parts = []
    on_cpu = points_N2.device.type == "cpu"
    for points_P2 in torch.split(
        points_N2, min(options.points_per_batch, CPU_POINTS) if on_cpu else options.points_per_batch
    ):
        labels_P1 = torch.ones(len(points_P2), 1, dtype=torch.int64, device=points_P2.device)
        logits, scores = model.decode(embedding, points_PK2=points_P2[:, None], labels_PK=labels_P1, several=True)
        logits_NMM, scores_N = logits.flatten(0, 1).float(), scores.flatten(0, 1).float()
        good = scores_N > options.pred_iou_thresh
        parts.append(_tested(model, crop, logits_NMM[good], scores_N[good], frame, options))
    whole = _Candidates(
        crop,
        torch.cat([part.logits_NMM for part in parts]),
        torch.cat([part.scores_N for part in parts]),
        torch.cat([part.boxes_N4 for part in parts]),
    )
    groups = torch.zeros(len(whole.scores_N), device=whole.scores_N.device)
    return whole.kept(batched_nms(whole.boxes_N4, whole.scores_N, groups, options.box_nms_thresh))


def _tested(
    model: Promptable, crop: Box, logits_NMM: Tensor, scores_N: Tensor, frame: Frame, options: GridOptions
) -> _Candidates:
    """Those whose masks are stable and end within the crop, with their boxes."""
    offset = options.stability_score_offset
    left, top, right, bottom = crop
    stable, boxes = [scores_N.new_zeros(0, dtype=torch.bool)], [scores_N.new_zeros(0, 4)]
    for logits_NHW in enlarged(model, logits_NMM, bottom - top, right - left):
        inner_N, outer_N = areas(logits_NHW > MASK_THRESHOLD + offset), areas(logits_NHW > MASK_THRESHOLD - offset)
        stable.append(inner_N / outer_N > options.stability_score_thresh)
        boxes.append(mask_boxes(logits_NHW > MASK_THRESHOLD))
    boxes_N4 = torch.cat(boxes) + boxes[0].new_tensor([left, top, left, top])
    edges = boxes_N4.new_tensor([crop, (0, 0, frame.width, frame.height)])
    at_crop_N4, at_image_N4 = ((boxes_N4 - edge).abs() <= EDGE for edge in edges)
    keep_N = torch.cat(stable) & ~(at_crop_N4 & ~at_image_N4).any(1)
    return _Candidates(crop, logits_NMM, scores_N, boxes_N4).kept(keep_N)


def enlarged(model: Enlarging, logits_NMM: Tensor, height: int, width: int) -> Iterator[Tensor]:
    """The masks' logits_NHW at the size of what was looked at, a few at a time."""
    if len(logits_NMM):
        step = max(1, CHUNK_VALUES // max(height * width, model.image_size**2))
        for part_NMM in torch.split(logits_NMM, step):
            yield model.enlarge(part_NMM, height, width)


def areas(mask_NHW: Tensor) -> Tensor:
    """Pixels of each mask. Sums of rows in 16 bits are 8 times faster on the CPU than in 64."""
    narrow = mask_NHW.shape[2] < 1 << 15
    return mask_NHW.sum(2, dtype=torch.int16 if narrow else torch.int64).sum(1, dtype=torch.int64)


def mask_boxes(mask_NHW: Tensor) -> Tensor:
    """boxes_N4 float (x1, y1, x2, y2), the last pixels included, of masks; zeros for one without a pixel."""
    values_NHW = mask_NHW.view(torch.uint8)  # on the CPU the largest byte is found 50 times faster than `any`
    columns, rows = values_NHW.amax(1).bool(), values_NHW.amax(2).bool()
    return torch.cat([_extent(columns), _extent(rows)], dim=1)[:, [0, 2, 1, 3]].float()


def _extent(line_NL: Tensor) -> Tensor:
    """First and last place that is true; zeros where none is."""
    places = torch.arange(line_NL.shape[1], device=line_NL.device)
    last = torch.where(line_NL, places, -1).amax(1)
    first = torch.where(line_NL, places, line_NL.shape[1]).amin(1)
    return torch.stack([first, last], dim=1) * (last >= 0)[:, None]


def _finish(model: Promptable, candidates: Sequence[_Candidates], frame: Frame, options: GridOptions) -> Segments:
    """Suppression between crops, small regions taken out, and the rest as run lengths."""
    if len(candidates) > 1:
        # Smaller crops see more of a mask: they go before larger ones, whatever the scores.
        boxes_N4 = torch.cat([one.boxes_N4 for one in candidates])
        sizes = [float((one.crop[2] - one.crop[0]) * (one.crop[3] - one.crop[1])) for one in candidates]
        ranks = (
            one.scores_N.new_full((len(one.scores_N),), 1 / area) for one, area in zip(candidates, sizes, strict=True)
        )
        rank_N = torch.cat([*ranks])
        keep_N = torch.zeros(len(boxes_N4), dtype=torch.bool, device=boxes_N4.device)
        keep_N[nms(boxes_N4, rank_N, options.crop_nms_thresh)] = True
        marks = torch.split(keep_N, [len(one.scores_N) for one in candidates])
        candidates = [one.kept(mark) for one, mark in zip(candidates, marks, strict=True)]
    scores, rles, boxes, changed = [], [], [], []
    canvas_HW = np.zeros((frame.height, frame.width), np.uint8, order="F")
    for one in candidates:
        left, top, right, bottom = one.crop
        scores.append(one.scores_N)
        for logits_NHW in enlarged(model, one.logits_NMM, bottom - top, right - left):
            for mask_HW in (logits_NHW > MASK_THRESHOLD).cpu().numpy():
                cleaned_HW = fill_and_clean(mask_HW, options.min_area)
                changed.append(cleaned_HW is not mask_HW)
                canvas_HW[top:bottom, left:right] = cleaned_HW
                rles.append(encode_rle(canvas_HW))
                if options.min_area:
                    boxes.append(mask_boxes(torch.from_numpy(canvas_HW.astype(bool))[None]))
                canvas_HW[top:bottom, left:right] = 0
    scores_N = torch.cat(scores).cpu()
    places, threshold = torch.arange(len(rles)), max(options.box_nms_thresh, options.crop_nms_thresh)
    if boxes:
        # A mask that became like another one when it was cleaned goes before one that was so from the start.
        places = nms(torch.cat(boxes), 1.0 - torch.tensor(changed).float(), threshold)
    order = places[torch.argsort(scores_N[places], descending=True, stable=True)]
    return segments_of(scores_N[order], [rles[place] for place in order.tolist()])


def segments_of(scores_N: Tensor, rles: Sequence[str]) -> Segments:
    """scores (N, float32), and the masks' run lengths as COCO compresses them: runs (uint8, the text of all of them)
    and lengths (N, int64). On the CPU."""
    text = "".join(rles).encode("ascii")
    return {
        "scores": scores_N.float().cpu(),
        "runs": torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8),
        "lengths": torch.tensor([len(rle) for rle in rles], dtype=torch.int64),
    }


def fill_and_clean(mask_HW: npt.NDArray[np.bool_], min_area: int) -> npt.NDArray[np.bool_]:
    """The mask without holes and then without islands of fewer than `min_area` pixels, neighbours being the eight
    around; the largest island stays. The same array where there is nothing to do."""
    holes_HW = _small(~mask_HW, min_area)
    filled_HW = mask_HW if holes_HW is None else mask_HW | holes_HW
    islands_HW = _small(filled_HW, min_area, keep_largest=True)
    return filled_HW if islands_HW is None else filled_HW & ~islands_HW


def _small(
    region_HW: npt.NDArray[np.bool_], min_area: int, *, keep_largest: bool = False
) -> npt.NDArray[np.bool_] | None:
    """The connected parts of fewer than `min_area` pixels, None where there are none."""
    if min_area < 2:
        return None
    ndimage: Any = import_extra("scipy.ndimage", "hf")
    parts_HW, count = ndimage.label(region_HW, np.ones((3, 3), bool))
    if not count:
        return None
    areas = np.bincount(parts_HW.ravel(), minlength=count + 1)
    small = areas < min_area
    small[0] = False
    if keep_largest:
        small[1 + areas[1:].argmax()] = False
    return np.asarray(small[parts_HW]) if small.any() else None
