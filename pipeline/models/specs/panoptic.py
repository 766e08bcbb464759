"""Models of label maps and segments from one pass, and the same models of instances alone."""

from collections.abc import Callable
from typing import Any

from torch import nn

from pipeline.models.spec import ModelSpec, Preprocess
from pipeline.models.zoo import hf_eomt, hf_oneformer, hf_universal, universal_post

__all__ = ["SPECS"]

COCO_800 = Preprocess(resize=800, max_size=1333, pad_multiple=32)
# EoMT's position embeddings are those of one square.
SQUARE_640 = Preprocess(resize=640, max_size=640, pad_multiple=640)


def _queries(name: str, build: Callable[..., nn.Module], paper: str, **fields: Any) -> ModelSpec:
    """A panoptic model, with the authors' threshold of a query's class probability."""
    common: dict[str, Any] = {
        "task": "panoptic",
        "taxonomy": "coco_panoptic",
        "postprocess": universal_post.panoptic,
        "options": {"score_threshold": 0.8},
        "forward": hf_universal.mask2former,
        "losses": hf_universal.query_losses,
        "loss_factors": hf_universal.MASK2FORMER_LOSSES,
        "preprocess": COCO_800,
        "adapt": hf_universal.adapt_universal,
    }
    return ModelSpec(
        name=name,
        build=build,
        paper=paper,
        extra=hf_universal.EXTRA,
        **{**common, **fields},
    )


def _instances(name: str, build: Callable[..., nn.Module], paper: str, **fields: Any) -> ModelSpec:
    """The same model of things alone, whose masks may overlap."""
    common = {"task": "instance", "taxonomy": "coco80", "postprocess": universal_post.instances, "options": None}
    return _queries(name, build, paper, **{**common, **fields})


MASKFORMER = "Cheng et al. 2021, arXiv:2107.06278"
MASK2FORMER = "Cheng et al. 2022, arXiv:2112.01527"
ONEFORMER = "Jain et al. 2023, arXiv:2211.06220"
EOMT = "Kerssies et al. 2025, arXiv:2503.19108"

SPECS = (
    _queries(
        "maskformer",
        hf_universal.build_maskformer,
        MASKFORMER,
        forward=hf_universal.maskformer,
        loss_factors=hf_universal.MASKFORMER_LOSSES,
        license="CC-BY-NC-4.0",
        commercial=False,
        weights=("hf:facebook/maskformer-swin-base-coco",),
    ),
    _queries(
        "mask2former",
        hf_universal.build_mask2former,
        MASK2FORMER,
        license="MIT",
        weights=("hf:facebook/mask2former-swin-large-coco-panoptic",),
    ),
    _instances(
        "mask2former_instance",
        hf_universal.build_mask2former,
        MASK2FORMER,
        license="MIT",
        weights=("hf:facebook/mask2former-swin-large-coco-instance",),
    ),
    _queries(
        "oneformer",
        hf_oneformer.build_oneformer,
        ONEFORMER,
        forward=hf_oneformer.oneformer,
        adapt=hf_oneformer.adapt_oneformer,
        losses=hf_oneformer.oneformer_losses,
        loss_factors=hf_oneformer.ONEFORMER_LOSSES,
        license="MIT",
        weights=("hf:shi-labs/oneformer_coco_swin_large",),
    ),
    _instances(
        "oneformer_instance",
        hf_oneformer.build_oneformer,
        ONEFORMER,
        forward=hf_oneformer.oneformer,
        adapt=hf_oneformer.adapt_oneformer,
        losses=hf_oneformer.oneformer_losses,
        loss_factors=hf_oneformer.ONEFORMER_LOSSES,
        # Its weights are one model for every task: stuff is among the classes, and left out of the segments.
        taxonomy="coco_panoptic",
        options={"task_input": "instance"},
        license="MIT",
        weights=("hf:shi-labs/oneformer_coco_swin_large",),
    ),
    _queries(
        "eomt",
        hf_eomt.build_eomt,
        EOMT,
        forward=hf_eomt.eomt,
        losses=hf_eomt.eomt_losses,
        at_step=hf_eomt.anneal_masks,
        preprocess=SQUARE_640,
        license="MIT",
        weights=("hf:tue-mps/coco_panoptic_eomt_large_640",),
    ),
    _instances(
        "eomt_instance",
        hf_eomt.build_eomt,
        EOMT,
        forward=hf_eomt.eomt,
        losses=hf_eomt.eomt_losses,
        at_step=hf_eomt.anneal_masks,
        preprocess=SQUARE_640,
        license="MIT",
        weights=("hf:tue-mps/coco_instance_eomt_large_640",),
    ),
)
