"""What a model is to the pipeline: how it is built, what goes in, what comes out, in which label space."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from pipeline.errors import PredictError, UnknownModelError
from pipeline.models.adapt import Adapt, as_named
from pipeline.taxonomy import Taxonomy

__all__ = [
    "Frame",
    "Instances",
    "ModelSpec",
    "PostContext",
    "Prediction",
    "Preprocess",
    "Prompts",
    "Quality",
    "Task",
    "find",
]

# semantic: a label map. instance: objects with masks, which may overlap. detection: objects as boxes alone. panoptic:
# a label map, and segments of things and stuff of which each pixel has at most one. depth: a depth map.
Task = Literal["semantic", "instance", "detection", "panoptic", "depth"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From image_HWC uint8 to the model's input: resize, scale to 0..1, subtract mean, divide by std, pad with zeros.

    resize: target length of the short side in pixels, None = as it is.
    max_size: limit of the long side in pixels after resizing; it wins over `resize`.
    pad_multiple: right and bottom are padded to a multiple of it, so the input depends on the image alone and never on
        its neighbours in the batch.
    antialias: low-pass filter when shrinking (what torchvision's presets do; its detectors do not).
    """

    resize: int | None = None
    max_size: int | None = None
    pad_multiple: int = 32
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    antialias: bool = True

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image after resizing, at least 1."""
        scale = 1.0 if self.resize is None else self.resize / min(height, width)
        if self.max_size is not None:
            scale = min(scale, self.max_size / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after padding."""
        step = self.pad_multiple
        return -(-height // step) * step, -(-width // step) * step


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the source says of where to look in one image, in pixels of the decoded image.

    boxes: x1, y1, x2, y2. points: x, y and 1 for inside or 0 for outside, all of one object. text: words.
    """

    boxes: tuple[tuple[float, float, float, float], ...] = ()
    points: tuple[tuple[float, float, int], ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """Sizes of one image of a batch: as decoded, and as prepared (without padding), in pixels.

    prompts: None where the source says nothing of where to look, which is not the same as nowhere.
    """

    height: int
    width: int
    prepared_height: int
    prepared_width: int
    prompts: Prompts | None = None

    def required_prompts(self) -> Prompts:
        """For models that look only where they are told to. Raises PredictError where the source says nothing."""
        if self.prompts is None:
            raise PredictError("expected prompts with the image (.prompts.json, or a column of them), got none")
        return self.prompts


@dataclass(frozen=True, slots=True)
class Quality:
    """Cheap confidence of one label map, over every fourth pixel in each direction.

    mean_max_probability: 0..1. mean_entropy: nats. low_confidence_share: share of pixels whose largest probability is
    below `low_confidence`.
    """

    mean_max_probability: float
    mean_entropy: float
    low_confidence_share: float


@dataclass(frozen=True, slots=True)
class Instances:
    """Objects of one image, compact: masks stay at the head's resolution until they are encoded, or are runs already.

    boxes_N4: float32 x1, y1, x2, y2 in pixels of the decoded image. scores_N: float32, descending. category_ids_N:
    int64. masks_NMM: float32 probabilities inside each box. rles: COCO's compressed run lengths of masks of the decoded
    image's size; their boxes are the masks' own, whatever boxes_N4 says. Neither: the objects are boxes.
    """

    boxes_N4: npt.NDArray[np.float32]
    scores_N: npt.NDArray[np.float32]
    category_ids_N: npt.NDArray[np.int64]
    masks_NMM: npt.NDArray[np.float32] | None = None
    rles: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says of one image, at the image's own size: label_HW, instances, both (panoptic: the instances are
    its segments, stuff among them), or depth_HW."""

    label_HW: npt.NDArray[Any] | None = None
    instances: Instances | None = None
    depth_HW: npt.NDArray[np.float32] | None = None
    depth_kind: str = ""
    quality: Quality | None = None


@dataclass(frozen=True, kw_only=True)
class PostContext:
    """What turns a model's output into labels, beside its weights. Part of the model's version.

    score_threshold, max_segments: instances kept. low_confidence: the bound of Quality.low_confidence_share.
    depth_kind: metric_m, relative or inverse_relative.
    """

    taxonomy: Taxonomy
    score_threshold: float = 0.5
    max_segments: int = 100
    low_confidence: float = 0.5
    depth_kind: str = "metric_m"


Postprocess = Callable[[Any, Sequence[Frame], PostContext], list[Prediction]]
Forward = Callable[[nn.Module, Any, Sequence[Frame]], Any]
AtStep = Callable[[nn.Module, float], None]
Losses = Callable[[nn.Module, Any, Sequence[Frame], Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]


def call(module: nn.Module, image_BCHW: Any, frames: Sequence[Frame]) -> Any:
    """The usual forward pass: the module on the padded batch."""
    return module(image_BCHW)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model of the registry, or of a user's own (`models: [{spec: "package.module:SPEC"}]`).

    build: `(num_classes, **options) -> nn.Module` with random weights; weights are loaded into it afterwards. Options
        are the parameters' names.
    num_classes: outputs for a taxonomy; by default one per category.
    adapt: published weights whose names are not the module's: of a classification network that is its backbone (for
        training's `partial_weights`), or of another library's model. Any other checkpoint comes back as it is.
    forward: runs the module on image_BCHW (float, normalised, padded) and the frames' sizes.
    postprocess: its output -> one Prediction per frame, at the frame's decoded size. None: the task's own.
    losses: of models whose loss comes with them (instance, detection, panoptic): runs the module in training mode on
        image_BCHW, the frames and each image's `boxes` (N, 4: x1, y1, x2, y2), `labels` (N) and `masks` (N, H, W,
        uint8), in prepared pixels; scalars by name, means over the images. None: it cannot be trained.
    loss_factors: how much each of them counts, by those names.
    at_step: what of the module follows the course of a training: called in every worker before each optimiser step,
        with the share of the run's steps that is done, 0 and more, under 1.
    background: the module's output 0 is no class and the others are ids of the taxonomy, as in torchvision's detectors;
        otherwise outputs are places in the taxonomy's list of categories. Labels that it learns from are such outputs.
    prompts: it looks where the sample says: `prompts` of the source reach its frames.
    dense: the output has the input's layout, so that an oversize image can be cut into blended tiles; not where a
        `postprocess` of its own says what it means. fits_tiles: it can be cut nevertheless, as a depth whose tiles are
        fitted to what the model says of the whole image made small.
    license: of the weights; commercial: False where it forbids commercial use.
    weights: addresses of published ones. extra: of this package, without which it cannot be built.
    """

    name: str
    task: Task
    build: Callable[..., nn.Module]
    preprocess: Preprocess
    taxonomy: str
    license: str
    num_classes: Callable[[Taxonomy], int] = lambda taxonomy: len(taxonomy.categories)
    adapt: Adapt = as_named
    forward: Forward = call
    postprocess: Postprocess | None = None
    losses: Losses | None = None
    loss_factors: Mapping[str, float] = field(default_factory=dict)
    at_step: AtStep | None = None
    background: bool = False
    prompts: bool = False
    fits_tiles: bool = False
    commercial: bool = True
    paper: str = ""
    weights: tuple[str, ...] = ()
    extra: str = ""
    options: Mapping[str, Any] | None = None

    def module(self, taxonomy: Taxonomy, options: Mapping[str, Any]) -> nn.Module:
        """Build it for a label space, with random weights. A `build` that has a parameter `taxonomy` is given it."""
        given = {"taxonomy": taxonomy} if "taxonomy" in inspect.signature(self.build).parameters else {}
        return self.build(self.num_classes(taxonomy), **given, **options)

    @property
    def dense(self) -> bool:
        return self.task in ("semantic", "depth") and self.postprocess is None

    @property
    def tiled(self) -> bool:
        """Whether an oversize image is cut into tiles."""
        return self.dense or self.fits_tiles


def find(specs: Mapping[str, ModelSpec], name: str) -> ModelSpec:
    """The spec of a name. Raises UnknownModelError with close matches."""
    if name in specs:
        return specs[name]
    close = difflib.get_close_matches(name, specs, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(specs)}"
    raise UnknownModelError(f"unknown model {name!r}; {hint}")
