"""Every model by name: one literal table."""

import difflib
import importlib

from pipeline.errors import ConfigError, UnknownModelError
from pipeline.models import torchvision_detection, torchvision_semantic
from pipeline.models.null import Null
from pipeline.models.spec import ModelSpec, Preprocess
from pipeline.models.unet import UNetSmall

__all__ = ["MODELS", "find_model"]

# torchvision's presets for its segmentation weights: short side 520, ImageNet statistics. The bound on the long side is
# ours: four times the short side, so that a 20000x10 strip cannot become a gigapixel.
SEMANTIC_520 = Preprocess(resize=520, max_size=2080, pad_multiple=8)
DETECTION_800 = Preprocess(resize=800, max_size=1333, pad_multiple=32, antialias=False)
COCO_VOC = "torchvision:{}_Weights.COCO_WITH_VOC_LABELS_V1"


def _torchvision_semantic(name: str, weights: str, paper: str) -> ModelSpec:
    return ModelSpec(
        name=name,
        task="semantic",
        build=torchvision_semantic.builder(name),
        preprocess=SEMANTIC_520,
        taxonomy="voc21",
        license="BSD-3-Clause",
        paper=paper,
        weights=(COCO_VOC.format(weights),),
    )


FCN = "Long et al. 2015, arXiv:1411.4038"
DEEPLAB = "Chen et al. 2017, arXiv:1706.05587"

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="unet_small",
            task="semantic",
            build=UNetSmall,
            preprocess=Preprocess(pad_multiple=16),
            taxonomy="scenes",
            license="Apache-2.0",
            paper="after Ronneberger et al. 2015, arXiv:1505.04597",
            weights=("bundled:unet_small_scenes",),
        ),
        ModelSpec(
            name="null_model",
            task="semantic",
            build=Null,
            preprocess=Preprocess(pad_multiple=1),
            taxonomy="scenes",
            license="Apache-2.0",
            paper="none: says the first class everywhere, for measuring everything but the model",
        ),
        _torchvision_semantic("fcn_resnet50", "FCN_ResNet50", FCN),
        _torchvision_semantic("fcn_resnet101", "FCN_ResNet101", FCN),
        _torchvision_semantic("deeplabv3_resnet50", "DeepLabV3_ResNet50", DEEPLAB),
        _torchvision_semantic("deeplabv3_resnet101", "DeepLabV3_ResNet101", DEEPLAB),
        _torchvision_semantic("deeplabv3_mobilenet_v3_large", "DeepLabV3_MobileNet_V3_Large", DEEPLAB),
        _torchvision_semantic(
            "lraspp_mobilenet_v3_large", "LRASPP_MobileNet_V3_Large", "Howard et al. 2019, arXiv:1905.02244"
        ),
        ModelSpec(
            name="maskrcnn_resnet50_fpn_v2",
            task="instance",
            build=torchvision_detection.build_maskrcnn_v2,
            forward=torchvision_detection.detect,
            preprocess=DETECTION_800,
            taxonomy="coco80",
            # COCO's 80 classes keep the ids of the original 90, so the head has 91 outputs with 0 as background.
            num_classes=lambda taxonomy: max(taxonomy.ids) + 1,
            license="BSD-3-Clause",
            paper="He et al. 2017, arXiv:1703.06870; Li et al. 2021, arXiv:2111.11429",
            weights=("torchvision:MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1",),
        ),
    )
}


def find_model(name: str) -> ModelSpec:
    """The spec of a registry name. Raises UnknownModelError with close matches."""
    if name in MODELS:
        return MODELS[name]
    close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(MODELS)}"
    raise UnknownModelError(f"unknown model {name!r}; {hint}")


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
