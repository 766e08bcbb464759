"""Detectors that look at proposed regions: the R-CNN family."""

from pipeline.models.adapt import backbone
from pipeline.models.spec import ModelSpec, Preprocess
from pipeline.models.zoo import detections, mnc, rcnn, torchvision_detection
from pipeline.taxonomy import Taxonomy

__all__ = ["SPECS"]

DETECTION_800 = Preprocess(resize=800, max_size=1333, pad_multiple=32, antialias=False)
# Girshick 2015, arXiv:1504.08083, section 5.2.
DETECTION_600 = Preprocess(resize=600, max_size=1000, pad_multiple=32, antialias=False)


def with_background(taxonomy: Taxonomy) -> int:
    """Outputs for the ids and 0. COCO's 80 classes keep the ids of the original 90: the heads have 91."""
    return max(taxonomy.ids) + 1


SPECS = (
    ModelSpec(
        name="maskrcnn_resnet50_fpn_v2",
        task="instance",
        build=torchvision_detection.build_maskrcnn_v2,
        adapt=backbone("backbone.body."),
        forward=torchvision_detection.detect,
        postprocess=detections.known_objects,
        losses=torchvision_detection.rcnn_losses,
        loss_factors=torchvision_detection.MASK_RCNN_LOSSES,
        background=True,
        preprocess=DETECTION_800,
        taxonomy="coco80",
        num_classes=with_background,
        license="BSD-3-Clause",
        paper="He et al. 2017, arXiv:1703.06870; Li et al. 2021, arXiv:2111.11429",
        weights=("torchvision:MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1",),
    ),
    ModelSpec(
        name="fasterrcnn_resnet50_fpn_v2",
        task="detection",
        build=torchvision_detection.build_fasterrcnn_v2,
        adapt=backbone("backbone.body."),
        forward=torchvision_detection.detect,
        postprocess=detections.known_objects,
        losses=torchvision_detection.rcnn_losses,
        loss_factors=torchvision_detection.FASTER_RCNN_LOSSES,
        background=True,
        preprocess=DETECTION_800,
        taxonomy="coco80",
        num_classes=with_background,
        license="BSD-3-Clause",
        paper="Ren et al. 2015, arXiv:1506.01497; Li et al. 2021, arXiv:2111.11429",
        weights=("torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1",),
    ),
    ModelSpec(
        name="maskrcnn",
        task="instance",
        build=rcnn.build_maskrcnn,
        adapt=rcnn.adapt_regions,
        forward=torchvision_detection.detect,
        postprocess=detections.known_objects,
        losses=torchvision_detection.rcnn_losses,
        loss_factors=torchvision_detection.MASK_RCNN_LOSSES,
        background=True,
        preprocess=DETECTION_800,
        taxonomy="coco80",
        num_classes=with_background,
        license="BSD-3-Clause",
        paper="He et al. 2017, arXiv:1703.06870",
    ),
    ModelSpec(
        name="fastrcnn",
        task="detection",
        build=rcnn.build_fastrcnn,
        adapt=rcnn.adapt_regions,
        forward=rcnn.detect_given,
        prompts=True,
        postprocess=detections.known_objects,
        losses=rcnn.fast_rcnn_losses,
        loss_factors=torchvision_detection.FAST_RCNN_LOSSES,
        background=True,
        preprocess=DETECTION_600,
        taxonomy="coco80",
        num_classes=with_background,
        license="BSD-3-Clause",
        paper="Girshick 2015, arXiv:1504.08083",
    ),
    ModelSpec(
        name="mnc",
        task="instance",
        build=mnc.build_mnc,
        adapt=rcnn.adapt_regions,
        forward=torchvision_detection.detect,
        postprocess=detections.known_objects,
        losses=torchvision_detection.rcnn_losses,
        loss_factors=mnc.MNC_LOSSES,
        background=True,
        preprocess=DETECTION_600,
        taxonomy="coco80",
        num_classes=with_background,
        license="BSD-3-Clause",
        paper="Dai et al. 2016, arXiv:1512.04412",
    ),
)
