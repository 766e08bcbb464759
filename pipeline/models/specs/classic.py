"""Recipes of shared parts, after the papers that came before end-to-end models."""

from collections.abc import Callable
from typing import Any

from torch import nn

from pipeline.models.adapt import Adapt, as_named
from pipeline.models.spec import ModelSpec, Preprocess, Task
from pipeline.models.zoo import hog, region_heads, selective_search
from pipeline.models.zoo.detections import placed_objects
from pipeline.models.zoo.hypercolumns import Hypercolumns
from pipeline.models.zoo.overfeat import OverFeat
from pipeline.models.zoo.region_crops import RCNN, SDS, adapt_sds
from pipeline.models.zoo.spp import SPPNet
from pipeline.models.zoo.vgg import adapt_vgg16

__all__ = ["SPECS"]

# R-CNN and SDS see VOC's images as they are, about 500 pixels wide; ours may be larger, and selective search takes its
# time by the pixel.
AS_IT_IS = Preprocess(max_size=500, pad_multiple=16)


def _recipe(
    name: str, task: Task, build: Callable[..., nn.Module], losses: tuple[str, ...], paper: str, **fields: Any
) -> ModelSpec:
    return ModelSpec(
        name=name,
        task=task,
        build=build,
        forward=region_heads.detect_frames,
        losses=region_heads.module_losses,
        loss_factors=dict.fromkeys(losses, 1.0),
        postprocess=placed_objects,
        license="Apache-2.0",
        paper=paper,
        **{"taxonomy": "coco80", "preprocess": AS_IT_IS, "adapt": as_named, **fields},
    )


VGG: Adapt = adapt_vgg16()
SEARCH = selective_search.EXTRA

SPECS = (
    _recipe(
        "rcnn",
        "detection",
        RCNN,
        ("loss_classifier", "loss_box"),
        "after Girshick et al. 2014, arXiv:1311.2524",
        adapt=VGG,
        prompts=True,
        extra=SEARCH,
    ),
    _recipe(
        "sppnet",
        "detection",
        SPPNet,
        ("loss_classifier", "loss_box"),
        "after He et al. 2014, arXiv:1406.4729",
        adapt=VGG,
        # The scale of its single-scale results.
        preprocess=Preprocess(resize=688, max_size=1200, pad_multiple=16),
        prompts=True,
        extra=SEARCH,
    ),
    _recipe(
        "overfeat",
        "detection",
        OverFeat,
        ("loss_classifier", "loss_box"),
        "after Sermanet et al. 2014, arXiv:1312.6229",
        adapt=VGG,
        # Near 245, the smallest of the paper's scales; the others are the model's.
        preprocess=Preprocess(resize=256, max_size=1024, pad_multiple=1),
    ),
    _recipe(
        "hypercolumns",
        "instance",
        Hypercolumns,
        ("loss_classifier", "loss_box", "loss_mask"),
        "after Hariharan et al. 2015, arXiv:1411.5752",
        adapt=VGG,
        prompts=True,
        extra=SEARCH,
    ),
    _recipe(
        "sds",
        "instance",
        SDS,
        ("loss_classifier", "loss_mask"),
        "after Hariharan et al. 2014, arXiv:1407.1808",
        adapt=adapt_sds,
        prompts=True,
        extra=SEARCH,
    ),
    _recipe(
        "hog_svm",
        "detection",
        hog.HogSVM,
        ("loss_hinge",),
        "after Dalal & Triggs 2005, https://doi.org/10.1109/CVPR.2005.177",
        taxonomy="scenes",
        preprocess=Preprocess(pad_multiple=1),
        extra=hog.EXTRA,
    ),
)
