"""Every model by name: one literal table."""

import functools
import importlib
from collections.abc import Iterator, Mapping

from pipeline.errors import ConfigError
from pipeline.models.spec import ModelSpec, find

__all__ = ["MODELS", "find_model"]

# Names by the module of `specs` that has their entries. A module is imported when one of its models is asked for: many
# need libraries that take seconds to import, and a worker has few models.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "small": ("unet_small", "null_model"),
    "semantic": (
        "fcn_resnet50",
        "fcn_resnet101",
        "deeplabv3_resnet50",
        "deeplabv3_resnet101",
        "deeplabv3_mobilenet_v3_large",
        "lraspp_mobilenet_v3_large",
        "segnet",
        "unet_2015",
        "fcn32s",
        "fcn16s",
        "fcn8s",
        "deconvnet",
        "deeplab_v1_largefov",
        "deeplab_v2_vgg16",
        "deeplab_v2_resnet101",
        "dilated_vgg16",
        "segmenter",
        "dpt_segmentation",
        "recurrent_cnn",
        "multiscale_cnn",
        "unet",
        "deeplabv3plus",
        "fpn",
        "pspnet",
        "upernet",
        "segformer",
    ),
    "regions": ("maskrcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn_v2", "maskrcnn", "fastrcnn", "mnc"),
    "detectors": (
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
        "yolo_v1",
        "rtdetr",
        "rtdetr_v2",
        "dfine",
        "rfdetr_seg",
    ),
    "panoptic": (
        "maskformer",
        "mask2former",
        "mask2former_instance",
        "oneformer",
        "oneformer_instance",
        "eomt",
        "eomt_instance",
    ),
    "depth": (
        "unet_small_depth",
        "dpt_depth",
        "midas_hybrid",
        "depth_anything_v2",
        "depth_anything_v2_metric",
        "depth_anything_v2_metric_outdoor",
        "zoedepth",
        "depth_pro",
    ),
    "promptable": ("sam", "sam2", "grounded_sam2", "sam3"),
    "classic": ("rcnn", "sppnet", "overfeat", "hypercolumns", "sds", "hog_svm"),
    "merged": ("panoptic_merge",),
}


class Models(Mapping[str, ModelSpec]):
    """Specs by name, in the order of FAMILIES."""

    def __init__(self) -> None:
        self._family = {name: family for family, names in FAMILIES.items() for name in names}

    def __getitem__(self, name: str) -> ModelSpec:
        return entries(self._family[name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._family)

    def __len__(self) -> int:
        return len(self._family)


@functools.cache
def entries(family: str) -> dict[str, ModelSpec]:
    """A family's specs by name. Those that are made of others are given all."""
    module = importlib.import_module(f"pipeline.models.specs.{family}")
    specs = module.specs(MODELS) if family == "merged" else module.SPECS
    return {spec.name: spec for spec in specs}


MODELS = Models()


def find_model(name: str) -> ModelSpec:
    """The spec of a registry name. Raises UnknownModelError with close matches."""
    return find(MODELS, name)


def import_spec(path: str) -> ModelSpec:
    """A user's own ModelSpec, "package.module:SPEC". Raises ConfigError where there is none."""
    module_name, _, attribute = path.partition(":")
    try:
        spec = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a user's module may raise anything
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"cannot import models.spec {path!r}: {type(error).__name__}: {text}") from error
    if not isinstance(spec, ModelSpec):
        raise ConfigError(f"models.spec {path!r} must be a ModelSpec, got {type(spec).__name__}")
    return spec
