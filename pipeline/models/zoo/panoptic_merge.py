"""One panoptic model of two others: any of instances and any of label maps, joined by the rule of panopticapi.

Axes: B batch, C channels, N segments, K classes, H rows, W columns.
"""

import inspect
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.roi_heads import paste_masks_in_image

from pipeline.masks import encode_rle
from pipeline.models.postprocess import POSTPROCESS, dense_output
from pipeline.models.spec import IMAGENET_MEAN, IMAGENET_STD, Frame, Instances, ModelSpec, PostContext, Prediction, find
from pipeline.segments import merge_panoptic
from pipeline.taxonomy import Taxonomy, load_taxonomy
from pipeline.taxonomy_mapping import TaxonomyMapping, map_taxonomy

__all__ = [
    "MERGE_LOSSES",
    "PanopticMerge",
    "adapt_merge",
    "build_panoptic_merge",
    "join_weights",
    "merge_at_step",
    "merge_forward",
    "merge_losses",
    "merge_postprocess",
]

MERGE_LOSSES = {"instance": 1.0, "semantic": 1.0}
PARTS = ("instance", "semantic")
INSTANCE = "maskrcnn_resnet50_fpn_v2"
SEMANTIC = "deeplabv3_resnet50"
MASK_THRESHOLD = 0.5
IGNORED = -1


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """One of the two models, in its own label space.

    to_whole: from that to the whole's. outputs_K: by the whole's places what the part learns them as, or IGNORED.
    """

    spec: ModelSpec
    taxonomy: Taxonomy
    to_whole: TaxonomyMapping
    outputs_K: Tensor

    def normalised(self, image_BCHW: Tensor, frames: Sequence[Frame]) -> Tensor:
        """The input with the part's own mean and deviation, 0 where it is padded."""
        preprocess = self.spec.preprocess
        if (preprocess.mean, preprocess.std) == (IMAGENET_MEAN, IMAGENET_STD):
            return image_BCHW
        own, given = (
            [image_BCHW.new_tensor(values).view(3, 1, 1) for values in pair]
            for pair in ((preprocess.mean, preprocess.std), (IMAGENET_MEAN, IMAGENET_STD))
        )
        image_BCHW = (image_BCHW * given[1] + given[0] - own[0]) / own[1]
        for image_CHW, frame in zip(image_BCHW, frames, strict=True):
            image_CHW[:, frame.prepared_height :] = 0
            image_CHW[:, :, frame.prepared_width :] = 0
        return image_BCHW

    def context(self, whole: PostContext) -> PostContext:
        return replace(whole, taxonomy=self.taxonomy)


class PanopticMerge(nn.Module):
    """Two models on the same images. overlap_threshold, stuff_area: see `segments.merge_panoptic`."""

    def __init__(
        self,
        instance: nn.Module,
        semantic: nn.Module,
        parts: Mapping[str, Part],
        overlap_threshold: float,
        stuff_area: int,
    ) -> None:
        super().__init__()
        self.instance, self.semantic = instance, semantic
        self.parts = parts
        self.overlap_threshold, self.stuff_area = overlap_threshold, stuff_area


class Outputs(dict[str, Any]):
    """What the two models say, `instance` and `semantic`, and the model that knows how to read it."""

    def __init__(self, instance: Any, semantic: Tensor, model: PanopticMerge) -> None:
        super().__init__(instance=instance, semantic=semantic)
        self.model = model


def build_panoptic_merge(
    models: Mapping[str, ModelSpec],
    taxonomy: Taxonomy,
    instance: Mapping[str, Any] | None = None,
    semantic: Mapping[str, Any] | None = None,
    *,
    overlap_threshold: float,
    stuff_area: int,
) -> PanopticMerge:
    """A model of instances and one of label maps, both random.

    instance, semantic: `name` among `models`, the model's options, and `taxonomy`, the name or address of its label
    space, whose classes are taken for those of the same name; by default the whole's things for the one, and the whole
    for the other. Both see what the whole's preprocessing gives, but with their own mean and deviation; that must not
    be changed. Their tensors are named `instance.*` and `semantic.*`: a checkpoint that training saved has both, and
    `join_weights` makes one of two.

    Raises ValueError for models of other tasks and options out of range, ConfigError for label spaces without a class
    in common, UnknownModelError.
    """
    if not 0 <= overlap_threshold <= 1 or stuff_area < 0:
        raise ValueError(
            f"overlap_threshold must be from 0 to 1 and stuff_area 0 or more, got {overlap_threshold}, {stuff_area}"
        )
    things = replace(
        taxonomy,
        name=f"{taxonomy.name}_things",
        categories=tuple(category for category in taxonomy.categories if category.kind == "thing"),
    )
    first, objects = _built(models, "instance", {"name": INSTANCE, **(instance or {})}, things, taxonomy)
    second, labels = _built(models, "semantic", {"name": SEMANTIC, **(semantic or {})}, taxonomy, taxonomy)
    return PanopticMerge(first, second, {"instance": objects, "semantic": labels}, overlap_threshold, stuff_area)


def _built(
    models: Mapping[str, ModelSpec], kind: str, given: Mapping[str, Any], default: Taxonomy, whole: Taxonomy
) -> tuple[nn.Module, Part]:
    options = dict(given)
    spec = find(models, options.pop("name"))
    if spec.task != kind or (kind == "semantic" and not spec.dense):
        raise ValueError(f"{kind}.name must be a model of task {kind}, got {spec.name} of task {spec.task}")
    named = options.pop("taxonomy", None)
    taxonomy = default if named is None else load_taxonomy(named)
    places = {id_: place for place, id_ in enumerate(taxonomy.ids)}
    learned = map_taxonomy(whole, taxonomy).apply_ids(whole.ids).tolist()
    outputs = [IGNORED if id_ not in places else id_ if spec.background else places[id_] for id_ in learned]
    part = Part(
        spec=spec,
        taxonomy=taxonomy,
        to_whole=map_taxonomy(taxonomy, whole),
        outputs_K=torch.tensor(outputs, device="cpu"),
    )
    return spec.module(taxonomy, {**_build_options(spec), **options}), part


def _build_options(spec: ModelSpec) -> dict[str, Any]:
    """Those of the spec's own options that its build takes."""
    known = inspect.signature(spec.build).parameters
    return {name: value for name, value in (spec.options or {}).items() if name in known}


def merge_forward(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Outputs:
    """Both models on the batch: the one's output as it is, the other's as logits_BKHW of the batch's size."""
    model: Any = module
    instance = model.parts["instance"]
    found = instance.spec.forward(model.instance, instance.normalised(image_BCHW, frames), frames)
    return Outputs(found, _logits(model, image_BCHW, frames), model)


def _logits(model: Any, image_BCHW: Tensor, frames: Sequence[Frame]) -> Tensor:
    part = model.parts["semantic"]
    logits_BKHW = dense_output(part.spec.forward(model.semantic, part.normalised(image_BCHW, frames), frames)).float()
    if logits_BKHW.shape[2:] != image_BCHW.shape[2:]:
        logits_BKHW = functional.interpolate(logits_BKHW, size=image_BCHW.shape[2:], mode="bilinear")
    return logits_BKHW


def merge_postprocess(output: Outputs, frames: Sequence[Frame], context: PostContext) -> list[Prediction]:
    """Disjoint segments, as `segments.merge_panoptic` joins them, and a label map that agrees with them: the semantic
    model's, but for the pixels of things."""
    model = output.model
    instance, semantic = (model.parts[name] for name in PARTS)
    read = instance.spec.postprocess or POSTPROCESS["instance"]
    found = read(output["instance"], frames, instance.context(context))
    labels = POSTPROCESS["semantic"](output["semantic"], frames, semantic.context(context))
    predictions = []
    for objects, label, frame in zip(found, labels, frames, strict=True):
        if objects.instances is None or label.label_HW is None:
            raise ValueError("expected instances of the one model and a label map of the other")
        label_HW = semantic.to_whole.apply(label.label_HW)
        segment_HW, segments = merge_panoptic(
            label_HW,
            _rows(objects.instances, frame, instance.to_whole),
            context.taxonomy,
            score_threshold=context.score_threshold,
            overlap_threshold=model.overlap_threshold,
            stuff_area=model.stuff_area,
        )
        category_by_id = np.array([0, *(segment["category_id"] for segment in segments)], label_HW.dtype)
        order = sorted(segments, key=lambda segment: -segment["score"])
        predictions.append(
            Prediction(
                label_HW=np.where(segment_HW > 0, category_by_id[segment_HW], label_HW),
                instances=Instances(
                    boxes_N4=np.zeros((len(order), 4), np.float32),
                    scores_N=np.array([segment["score"] for segment in order], np.float32),
                    category_ids_N=np.array([segment["category_id"] for segment in order], np.int64),
                    rles=tuple(encode_rle(segment_HW == segment["id"]) for segment in order),
                ),
                quality=label.quality,
            )
        )
    return predictions


def _rows(instances: Instances, frame: Frame, to_whole: TaxonomyMapping) -> list[dict[str, Any]]:
    """Instances in the whole's categories with run lengths of the decoded size, each mask pasted alone. Left out are
    outputs that no category has; those of a category that the whole lacks are void there, which is no thing."""
    size = (frame.height, frame.width)
    rows = []
    for at, category_id in enumerate(instances.category_ids_N.tolist()):
        if category_id not in to_whole.source.by_id:
            continue
        if instances.rles is not None:
            rle = instances.rles[at]
        elif instances.masks_NMM is not None:
            mask_11MM = torch.from_numpy(instances.masks_NMM[at : at + 1])[:, None]
            pasted_11HW = paste_masks_in_image(mask_11MM, torch.from_numpy(instances.boxes_N4[at : at + 1]), size)
            rle = encode_rle(pasted_11HW[0, 0].numpy() > MASK_THRESHOLD)
        else:
            raise ValueError("expected masks of the instance model, got boxes")
        category = int(to_whole.apply_ids([category_id])[0])
        rows.append({"category_id": category, "score": float(instances.scores_N[at]), "rle": rle})
    return rows


def merge_losses(
    module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """`instance`: the one model's own losses by their factors, of the things that it knows. `semantic`: the other's
    cross-entropy over the pixels of an image's segments that it knows, averaged over the images."""
    model: Any = module
    instance, semantic = (model.parts[name] for name in PARTS)
    if instance.spec.losses is None:
        raise ValueError(f"model {instance.spec.name} is not trained here: it has no loss")
    things = []
    for target in targets:
        labels_N = instance.outputs_K.to(target["labels"].device)[target["labels"]]
        things.append({name: values[labels_N != IGNORED] for name, values in {**target, "labels": labels_N}.items()})
    own = instance.spec.losses(model.instance, instance.normalised(image_BCHW, frames), frames, things)
    factors = instance.spec.loss_factors
    logits_BKHW = _logits(model, image_BCHW, frames)
    target_BHW = _label_maps(targets, semantic.outputs_K, image_BCHW)
    per_pixel_BHW = functional.cross_entropy(logits_BKHW, target_BHW, ignore_index=IGNORED, reduction="none")
    valid_B = (target_BHW != IGNORED).sum((1, 2)).clamp_min(1)
    return {
        "instance": torch.stack([factors[name] * loss for name, loss in own.items()]).sum(),
        "semantic": (per_pixel_BHW.sum((1, 2)) / valid_B).mean(),
    }


def merge_at_step(module: nn.Module, done: float) -> None:
    """Each model's own `at_step`."""
    model: Any = module
    for name in PARTS:
        at_step = model.parts[name].spec.at_step
        if at_step is not None:
            at_step(getattr(model, name), done)


def _label_maps(targets: Sequence[Mapping[str, Tensor]], outputs_K: Tensor, image_BCHW: Tensor) -> Tensor:
    target_BHW = image_BCHW.new_full((len(image_BCHW), *image_BCHW.shape[2:]), IGNORED, dtype=torch.int64)
    for target_HW, target in zip(target_BHW, targets, strict=True):
        height, width = target["masks"].shape[1:]
        labels_N = outputs_K.to(target_HW.device)[target["labels"]]
        for mask_HW, label in zip(target["masks"], labels_N, strict=True):
            target_HW[:height, :width][mask_HW > 0] = label
    return target_BHW


def join_weights(instance: Mapping[str, Tensor], semantic: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a whole from those of its parts, each under its own module's names."""
    states = zip(PARTS, (instance, semantic), strict=True)
    return {f"{part}.{name}": tensor for part, state in states for name, tensor in state.items()}


def adapt_merge(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """A checkpoint of the whole as it is. One of a part, under that module's own names, goes to the part that has more
    of them (training's `partial_weights` begins from it)."""
    if any(name in wanted for name in given):
        return dict(given)
    counts = {part: sum(f"{part}.{name}" in wanted for name in given) for part in PARTS}
    best = max(PARTS, key=lambda part: counts[part])
    return {f"{best}.{name}": tensor for name, tensor in given.items()} if counts[best] else dict(given)
