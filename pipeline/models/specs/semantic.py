"""Models of label maps."""

from collections.abc import Callable
from typing import Any

from torch import nn

from pipeline.models.adapt import Adapt, backbone
from pipeline.models.spec import ModelSpec, Preprocess
from pipeline.models.zoo import hf_dpt_segmentation, segmenter, smp_semantic, torchvision_semantic
from pipeline.models.zoo.deconvnet import DeconvNet, adapt_deconvnet
from pipeline.models.zoo.deeplab_vgg import (
    adapt_deeplab_resnet,
    adapt_deeplab_vgg,
    deeplab_v1_largefov,
    deeplab_v2_resnet101,
    deeplab_v2_vgg16,
)
from pipeline.models.zoo.dilated import DilatedVGG, adapt_dilated
from pipeline.models.zoo.fcn_vgg import adapt_fcn, fcn8s, fcn16s, fcn32s
from pipeline.models.zoo.multiscale import MultiscaleCNN
from pipeline.models.zoo.recurrent_cnn import RecurrentCNN
from pipeline.models.zoo.segnet import SegNet, adapt_vgg
from pipeline.models.zoo.unet_2015 import UNet2015

__all__ = ["SPECS"]

# torchvision's presets for its segmentation weights: short side 520, ImageNet statistics. The bound on the long side is
# ours: four times the short side, so that a 20000x10 strip cannot become a gigapixel.
SEMANTIC_520 = Preprocess(resize=520, max_size=2080, pad_multiple=8)
COCO_VOC = "torchvision:{}_Weights.COCO_WITH_VOC_LABELS_V1"


def _torchvision_semantic(name: str, weights: str, paper: str) -> ModelSpec:
    return ModelSpec(
        name=name,
        task="semantic",
        build=torchvision_semantic.builder(name),
        adapt=backbone("backbone."),
        preprocess=SEMANTIC_520,
        taxonomy="voc21",
        license="BSD-3-Clause",
        paper=paper,
        weights=(COCO_VOC.format(weights),),
    )


def _smp(name: str, build: Callable[..., nn.Module], taxonomy: str, paper: str, **fields: Any) -> ModelSpec:
    return ModelSpec(
        name=name,
        task="semantic",
        build=build,
        adapt=smp_semantic.adapt_encoder,
        preprocess=Preprocess(pad_multiple=32),
        taxonomy=taxonomy,
        paper=paper,
        extra=smp_semantic.EXTRA,
        **{"license": "MIT", **fields},
    )


def _voc(
    name: str,
    build: Callable[..., nn.Module],
    adapt: Adapt,
    paper: str,
    *,
    pad_multiple: int = 1,
) -> ModelSpec:
    """Of the networks that were made for VOC and begin from ImageNet. Those that take any size are not padded."""
    return ModelSpec(
        name=name,
        task="semantic",
        build=build,
        adapt=adapt,
        preprocess=Preprocess(pad_multiple=pad_multiple),
        taxonomy="voc21",
        license="Apache-2.0",
        paper=paper,
    )


FCN = "Long et al. 2015, arXiv:1411.4038"
DEEPLAB_2 = "Chen et al. 2018, arXiv:1606.00915"
DEEPLAB = "Chen et al. 2017, arXiv:1706.05587"

SPECS = (
    _torchvision_semantic("fcn_resnet50", "FCN_ResNet50", FCN),
    _torchvision_semantic("fcn_resnet101", "FCN_ResNet101", FCN),
    _torchvision_semantic("deeplabv3_resnet50", "DeepLabV3_ResNet50", DEEPLAB),
    _torchvision_semantic("deeplabv3_resnet101", "DeepLabV3_ResNet101", DEEPLAB),
    _torchvision_semantic("deeplabv3_mobilenet_v3_large", "DeepLabV3_MobileNet_V3_Large", DEEPLAB),
    _torchvision_semantic(
        "lraspp_mobilenet_v3_large", "LRASPP_MobileNet_V3_Large", "Howard et al. 2019, arXiv:1905.02244"
    ),
    ModelSpec(
        name="segnet",
        task="semantic",
        build=SegNet,
        adapt=adapt_vgg,
        preprocess=Preprocess(pad_multiple=32),
        taxonomy="camvid11",
        license="Apache-2.0",
        paper="Badrinarayanan et al. 2017, arXiv:1511.00561",
    ),
    ModelSpec(
        name="unet_2015",
        task="semantic",
        build=UNet2015,
        # It takes any size, and mirrors the image, which padding would come between.
        preprocess=Preprocess(pad_multiple=1),
        taxonomy="scenes",
        license="Apache-2.0",
        paper="Ronneberger et al. 2015, arXiv:1505.04597",
    ),
    _voc("fcn32s", fcn32s, adapt_fcn, FCN),
    _voc("fcn16s", fcn16s, adapt_fcn, FCN),
    _voc("fcn8s", fcn8s, adapt_fcn, FCN),
    _voc("deconvnet", DeconvNet, adapt_deconvnet, "Noh et al. 2015, arXiv:1505.04366", pad_multiple=32),
    _voc("deeplab_v1_largefov", deeplab_v1_largefov, adapt_deeplab_vgg, "Chen et al. 2015, arXiv:1412.7062"),
    _voc("deeplab_v2_vgg16", deeplab_v2_vgg16, adapt_deeplab_vgg, DEEPLAB_2),
    _voc("deeplab_v2_resnet101", deeplab_v2_resnet101, adapt_deeplab_resnet, DEEPLAB_2),
    _voc("dilated_vgg16", DilatedVGG, adapt_dilated, "Yu & Koltun 2016, arXiv:1511.07122", pad_multiple=8),
    ModelSpec(
        name="segmenter",
        task="semantic",
        build=segmenter.build_segmenter,
        adapt=segmenter.adapt_segmenter,
        # augreg's vision transformers see values from -1 to 1.
        preprocess=Preprocess(pad_multiple=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        taxonomy="ade20k150",
        license="Apache-2.0",
        paper="Strudel et al. 2021, arXiv:2105.05633",
        extra=segmenter.EXTRA,
    ),
    ModelSpec(
        name="dpt_segmentation",
        task="semantic",
        build=hf_dpt_segmentation.build_dpt_segmentation,
        adapt=hf_dpt_segmentation.adapt_dpt_segmentation,
        forward=hf_dpt_segmentation.dpt_segmentation,
        # As published: 480 pixels, values from -1 to 1. The bound on the long side is ours.
        preprocess=Preprocess(resize=480, max_size=1920, pad_multiple=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        taxonomy="ade20k150",
        license="Apache-2.0",
        paper="Ranftl et al. 2021, arXiv:2103.13413",
        weights=("hf:Intel/dpt-large-ade",),
        extra=hf_dpt_segmentation.EXTRA,
    ),
    ModelSpec(
        name="recurrent_cnn",
        task="semantic",
        build=RecurrentCNN,
        preprocess=Preprocess(pad_multiple=4),
        taxonomy="scenes",
        license="Apache-2.0",
        paper="after Pinheiro & Collobert 2014, https://proceedings.mlr.press/v32/pinheiro14.html",
    ),
    ModelSpec(
        name="multiscale_cnn",
        task="semantic",
        build=MultiscaleCNN,
        preprocess=Preprocess(pad_multiple=16),
        taxonomy="scenes",
        license="Apache-2.0",
        paper="after Farabet et al. 2013, https://doi.org/10.1109/TPAMI.2012.231",
    ),
    _smp(
        "unet",
        smp_semantic.builder("Unet", "resnet34"),
        "scenes",
        "after Ronneberger et al. 2015, arXiv:1505.04597",
    ),
    _smp(
        "deeplabv3plus",
        smp_semantic.builder("DeepLabV3Plus", "resnet50"),
        "voc21",
        "Chen et al. 2018, arXiv:1802.02611",
    ),
    _smp("fpn", smp_semantic.builder("FPN", "resnet50"), "cityscapes19", "Kirillov et al. 2019, arXiv:1901.02446"),
    _smp("pspnet", smp_semantic.build_pspnet, "ade20k150", "Zhao et al. 2017, arXiv:1612.01105"),
    _smp("upernet", smp_semantic.builder("UPerNet", "resnet50"), "ade20k150", "Xiao et al. 2018, arXiv:1807.10221"),
    _smp(
        "segformer",
        smp_semantic.builder("Segformer", "mit_b0"),
        "ade20k150",
        "Xie et al. 2021, arXiv:2105.15203",
        # Of the default encoder, its code and weights. With another encoder the library's MIT holds.
        license="NVIDIA Source Code License (non-commercial)",
        commercial=False,
    ),
)
