"""The config of a training run: what is trained, on which images, how, and where its checkpoints go.

Losses, augmentation, optimiser and schedule are checked in full when they are built (pipeline/training/setup.py), which
knows the model; here only what one field says alone.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import CostConfig, LogConfig, ModelConfig, Section, SourceConfig, Storage, WorkerResources

__all__ = [
    "AugmentConfig",
    "BorderConfig",
    "CheckpointConfig",
    "DepthLossConfig",
    "DepthTargetConfig",
    "FreezeConfig",
    "LossConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "SemanticLossConfig",
    "TargetConfig",
    "TrainConfig",
    "TrainOutput",
    "TrainResources",
    "ValidationConfig",
]

Count = Annotated[int, Field(ge=1)]
Auto = Literal["auto"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class ValidationConfig(Section):
    source: SourceConfig = Field(description="images that are scored and never trained on")
    every_epochs: int = Field(1, ge=1, description="epochs from one validation to the next; the last epoch has one too")
    batch_images: int = Field(
        8, ge=1, description="images in one forward pass; batches are the same however many workers share them"
    )
    alignment: Literal["none", "median", "least_squares", "least_squares_disparity"] = Field(
        "none", description="depth: fit of each prediction to its target, for models without a scale of their own"
    )
    sheet_images: int = Field(
        6, ge=0, le=50, description="images that are drawn with their predictions, the same each time; 0: no sheets"
    )


class DepthTargetConfig(Section):
    scale: float = Field(0.001, gt=0, description="metres of one step of an integer depth target (KITTI: 0.00390625)")
    invalid: tuple[float, ...] = Field((0.0,), description="stored values that mean no depth (7-Scenes: 0 and 65535)")
    min_depth: float = Field(0.001, gt=0, description="metres; nearer targets are neither learned from nor scored")
    max_depth: float | None = Field(None, gt=0, description="metres; likewise farther ones (NYU: 10, KITTI: 80)")


class TargetConfig(Section):
    """How the data set's targets become the model's. They are mapped into the model's label space."""

    taxonomy: str | None = Field(
        None,
        description="label space of the targets: a bundled name or a YAML file; default: the COCO files' categories, "
        "else the model's own",
    )
    merge: dict[str | int, tuple[str | int, ...]] = Field(
        {}, description="class of the model -> classes of the targets that become it, by name or id"
    )
    ids: dict[int, int] = Field({}, description="class id of the targets -> class id of the model")
    other: str | int | None = Field(None, description="class of the model that unmapped classes become; default: void")
    ignore: tuple[int, ...] = Field((), description="further values of the target's label map that are void")
    unknown_is_void: bool = Field(False, description="take target ids outside the taxonomy as void, instead of failing")
    depth: DepthTargetConfig = Field(DepthTargetConfig(), description="what a depth target's values mean")


class BorderConfig(Section):
    """U-Net's weight map (Ronneberger et al. 2015, eq. 2), at the size that the model sees."""

    w0: float = Field(
        10.0, gt=0, description="what a pixel between two objects counts for at most, on top of its class"
    )
    sigma: float = Field(5.0, gt=0, description="pixels: how fast that falls with the distances to the two objects")
    classes: tuple[str | int, ...] = Field(
        (), description="classes, by name or id, between whose objects borders are; none named: all things"
    )


class SemanticLossConfig(Section):
    cross_entropy: float = Field(1.0, ge=0, description="what softmax cross-entropy counts for; 0: not computed")
    focal: float = Field(0.0, ge=0, description="what the focal loss counts for (Lin et al. 2017)")
    dice: float = Field(0.0, ge=0, description="what the Dice loss counts for (Milletari et al. 2016)")
    lovasz: float = Field(0.0, ge=0, description="what the Lovasz-softmax counts for (Berman et al. 2018)")
    class_weights: dict[str | int, NotNegative] = Field(
        {}, description="class, by name or id -> its weight in the cross-entropy; classes left out weigh 1"
    )
    border: BorderConfig | None = Field(
        None, description="weigh the cross-entropy up between objects that nearly touch; null: not"
    )
    focal_gamma: float = Field(2.0, ge=0, description="focusing exponent of the focal loss; 2 is the paper's best")
    focal_alpha: dict[str | int, NotNegative] = Field(
        {}, description="class, by name or id -> its weight in the focal loss; classes left out weigh 1"
    )
    per_image: bool = Field(
        True, description="Dice and Lovasz of single images; the batch as one depends on the number of workers"
    )
    heads: dict[str, NotNegative] = Field(
        {"out": 1.0, "aux": 0.5}, description="what the losses of each of the model's outputs count for"
    )


class DepthLossConfig(Section):
    kind: Literal["l1", "l2", "smooth_l1", "log_l1", "silog", "scale_shift_invariant"] = Field(
        "l1", description="loss of metres by pixel, of their logarithm (silog: Eigen 2014), or of shape (MiDaS 2020)"
    )
    inverse: bool = Field(False, description="the model gives 1 / depth, and targets are turned into that")
    beta: float = Field(1.0, gt=0, description="smooth_l1: metres from which the loss is linear")
    variance_focus: Share = Field(0.5, description="silog: 0 is the plain squared log error, 1 does not see the scale")
    alignment: Literal["least_squares", "robust"] = Field(
        "robust", description="scale_shift_invariant: fit by least squares, or by median and absolute deviation"
    )
    trim: float = Field(0.2, ge=0, lt=1, description="scale_shift_invariant: share of largest residuals left out")
    gradient_scales: int = Field(4, ge=0, description="scale_shift_invariant: resolutions of gradient matching")
    gradient_factor: float = Field(0.5, ge=0, description="scale_shift_invariant: what gradient matching counts for")


class LossConfig(Section):
    """The section of the model's task is used."""

    semantic: SemanticLossConfig = Field(SemanticLossConfig(), description="losses of label maps")
    depth: DepthLossConfig = Field(DepthLossConfig(), description="loss of depth maps")
    own: dict[str, NotNegative] = Field(
        {}, description="a detector's own losses by name -> what each counts for, instead of the model's own factor"
    )


class AugmentConfig(Section):
    scale: tuple[Positive, Positive] = Field(
        (1.0, 1.0), description="range of a random factor on the size that the model's preprocessing gives"
    )
    crop: tuple[Count, Count] | None = Field(
        None, description="height and width that are cut out at random, in pixels; null: the whole image"
    )
    pad: Literal["void", "mirror"] = Field(
        "void", description="around images smaller than the crop: grey that is not learned from, or a reflection"
    )
    flip: Share = Field(0.5, description="probability of left to right")
    brightness: Share = Field(0.0, description="b: a factor from 1 - b to 1 + b")
    contrast: Share = Field(0.0, description="c: a factor from 1 - c to 1 + c")
    saturation: Share = Field(0.0, description="s: a factor from 1 - s to 1 + s")
    hue: float = Field(0.0, ge=0, le=0.5, description="h: a shift from -h to h of the colour circle")
    zoom_depth: bool = Field(False, description="divide depth by the magnification, as if the camera had moved")


class OptimizerConfig(Section):
    kind: Literal["adamw", "sgd"] = Field("adamw", description="AdamW forgives a wrong learning rate; SGD has momentum")
    learning_rate: float = Field(1e-3, gt=0, description="at the schedule's top, for a whole batch of batch_images")
    weight_decay: float = Field(1e-2, ge=0, description="of all parameters but biases and those of normalisations")
    backbone_factor: float = Field(1.0, ge=0, description="what the backbone's learning rate is multiplied by")
    layer_decay: float = Field(1.0, gt=0, le=1, description="further factor from stage to stage towards the input")
    backbone: str = Field("", description="name of the backbone's submodule; default: found by the usual names")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="adamw: decay of its two averages")
    eps: float = Field(1e-8, gt=0, description="adamw: added to the divisor")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd: share of the last step that is kept")
    nesterov: bool = Field(False, description="sgd: Nesterov's momentum")


class ScheduleConfig(Section):
    kind: Literal["constant", "poly", "cosine", "step"] = Field("poly", description="how the learning rate falls")
    power: float = Field(0.9, gt=0, description="poly: exponent of the share of steps that is left")
    milestones: tuple[NotNegative, ...] = Field((), description="step: epochs after which the rate falls by gamma")
    gamma: float = Field(0.1, gt=0, le=1, description="step: factor at each milestone")
    floor: Share = Field(0.0, description="poly and cosine: they end at this share of the learning rate")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs in which the rate rises to its top, fractions too")


class FreezeConfig(Section):
    stages: int = Field(0, ge=0, description="stages of the backbone, from the input on, that do not learn")
    epochs: int | None = Field(None, ge=1, description="epochs after which they do; null: never")


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, ge=1, description="optimiser steps between checkpoints within an epoch")
    every_epochs: int = Field(1, ge=1, description="epochs between checkpoints; the last epoch has one too")
    keep: int = Field(2, ge=1, description="how many of the newest are kept, besides the best")
    best: str | None = Field(
        None, description="figure of the validation that tells the best; default: mIoU, AbsRel, or segm/AP by task"
    )
    attempts: int = Field(
        5, ge=1, description="tries to write or read one of their files, each after twice the pause before"
    )


class TrainOutput(Section):
    uri: str = Field(description="folder of checkpoints and figures, local or object storage")
    storage: Storage = Field({}, description="fsspec options for the output")
    tensorboard: bool = Field(False, description="write the figures as TensorBoard's event file as well")


class TrainResources(WorkerResources):
    workers: Count | Auto = Field("auto", description="training processes; auto: one per GPU, else one")
    min_workers: Count | None = Field(
        None, description="go on with as few, from the last checkpoint, until there is room for all; null: wait for all"
    )
    layout: Literal["fused", "split"] = Field(
        "fused", description="fused: workers read and prepare; split: Ray Data on any node reads and prepares for them"
    )
    readers: Count | Auto = Field("auto", description="split layout: preparing tasks at once for each worker")
    torch_threads: Count | Auto = Field(
        "auto", description="threads of the forward pass on CPU; auto: the worker's part of its node's CPUs"
    )
    decode_threads: Count | Auto = Field("auto", description="decoding and augmenting threads; auto: 2 to 8 by cores")

    @model_validator(mode="after")
    def _counts_whole_workers(self) -> Self:
        # Ray 2.60 counts the workers that have room in whole resources, and would wait for ever for parts of them.
        parts = self.cpus_per_worker % 1 or (self.gpus_per_worker != "auto" and self.gpus_per_worker % 1)
        if self.min_workers is not None and parts:
            raise ValueError("min_workers needs whole cpus_per_worker and gpus_per_worker")
        return self


class TrainConfig(Section):
    """Train one model. The number of workers changes how long that takes, not what is learned."""

    source: SourceConfig = Field(description="images and targets that are learned from")
    validation: ValidationConfig | None = Field(None, description="how far it has come; null: nothing is scored")
    model: ModelConfig = Field(description="the architecture, and in `weights` what it starts from")
    partial_weights: bool = Field(
        False, description="start from what of the weights fits the model (another head); false: all must fit"
    )
    target: TargetConfig = Field(TargetConfig(), description="what the targets mean")
    loss: LossConfig = Field(LossConfig(), description="what is minimised")
    augment: AugmentConfig = Field(AugmentConfig(), description="what varies between epochs")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="how weights follow gradients")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="learning rate over the run")
    epochs: int = Field(ge=1, description="how often each image is seen")
    batch_images: int = Field(16, ge=1, description="images of one optimiser step, over all workers")
    accumulate: int = Field(1, ge=1, description="forward passes into which each worker cuts its part of a batch")
    shuffle_images: int = Field(
        2000, ge=1, description="images that are mixed at least; units are drawn at random, in groups of that many"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the forward pass; weights stay fp32")
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="each worker has the whole model, or (fsdp) its part of weights, gradients and optimiser state; "
        "either learns the same and goes on from the other's checkpoint",
    )
    batch_norm: Literal["local", "synced", "frozen"] = Field(
        "local",
        description="statistics of each worker's own images, of all workers' (as if one had them all), or as they were",
    )
    freeze: FreezeConfig = Field(FreezeConfig(), description="what of the backbone does not learn")
    ema: float | None = Field(
        None, ge=0, lt=1, description="decay of averaged weights, which are then validated and kept (0.9999)"
    )
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the whole gradient; null: as it is")
    seed: int = Field(0, ge=0, description="of new weights, order, augmentation and dropout")
    failure_budget: Share = Field(
        0.01, description="share of an epoch's images that may be unreadable or without a target before the run stops"
    )
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="when the state is kept, and how much of it")
    output: TrainOutput = Field(description="where checkpoints and figures go")
    resources: TrainResources = Field(TrainResources(), description="the cluster's share for this run")
    cost: CostConfig | None = Field(None, description="what the cluster costs; null: nothing is said of it")
    log: LogConfig = Field(LogConfig(), description="structured log of failed images, checkpoints, worker deaths")
    ray_address: str | None = Field(None, description="Ray cluster to join; default: RAY_ADDRESS, else a local one")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.accumulate > self.batch_images:
            raise ValueError(f"accumulate must be at most batch_images, got {self.accumulate} and {self.batch_images}")
        if self.checkpoint.best is not None and self.validation is None:
            raise ValueError("checkpoint.best needs a validation section")
        if self.freeze.epochs is not None and not self.freeze.stages:
            raise ValueError("freeze.epochs needs freeze.stages of 1 or more")
        if self.strategy == "fsdp" and self.model.options.get("compile"):
            # Each unit's gathering breaks the graph: it would run, and nothing would be compiled.
            raise ValueError("model.options.compile must be false where strategy is fsdp, got true")
        return self
