"""Models of depth maps."""

from typing import Any

from pipeline.models.spec import ModelSpec, Preprocess
from pipeline.models.zoo import hf_depth, hf_depth_anything, hf_depth_pro, hf_zoedepth
from pipeline.models.zoo.hf_depth_shared import EXTRA, bicubic_depth, disparity_resized
from pipeline.models.zoo.unet_depth import DepthUNetSmall

__all__ = ["SPECS"]

# MiDaS' for DPT: 384 pixels, values from -1 to 1.
DPT_384 = Preprocess(resize=384, max_size=1536, pad_multiple=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
# As published; the bound on the long side is ours, as for DPT.
DEPTH_ANYTHING_518 = Preprocess(resize=518, max_size=2072, pad_multiple=14)
DEPTH_ANYTHING_WEIGHTS = "hf:depth-anything/Depth-Anything-V2-{}-hf"
METRIC_INDOOR = ("Metric-Indoor-Small", "Metric-Indoor-Base", "Metric-Indoor-Large")
METRIC_OUTDOOR = ("Metric-Outdoor-Small", "Metric-Outdoor-Base", "Metric-Outdoor-Large")


def _whole(max_size: int) -> Preprocess:
    """For models that resize the image themselves, all of it to one size: only what is far larger is shrunk before, and
    tiles would need no less memory."""
    return Preprocess(resize=None, max_size=max_size, pad_multiple=1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _depth_anything(name: str, depth_kind: str, weights: tuple[str, ...], **options: Any) -> ModelSpec:
    return ModelSpec(
        name=name,
        task="depth",
        build=hf_depth_anything.build_depth_anything,
        num_classes=lambda taxonomy: 1,
        adapt=hf_depth_anything.adapt_depth_anything,
        forward=hf_depth_anything.depth_anything,
        postprocess=bicubic_depth,
        fits_tiles=True,
        preprocess=DEPTH_ANYTHING_518,
        taxonomy="scenes",
        options={"depth_kind": depth_kind, **options},
        # Of the small weights; for the others see licences.py.
        license="Apache-2.0",
        paper="Yang et al. 2024, arXiv:2406.09414",
        weights=tuple(DEPTH_ANYTHING_WEIGHTS.format(one) for one in weights),
        extra=EXTRA,
    )


SPECS = (
    ModelSpec(
        name="unet_small_depth",
        task="depth",
        build=DepthUNetSmall,
        num_classes=lambda taxonomy: 1,
        preprocess=Preprocess(pad_multiple=16),
        taxonomy="scenes",
        license="Apache-2.0",
        paper="after Ronneberger et al. 2015, arXiv:1505.04597",
    ),
    ModelSpec(
        name="dpt_depth",
        task="depth",
        build=hf_depth.build_dpt,
        num_classes=lambda taxonomy: 1,
        adapt=hf_depth.adapt_dpt,
        forward=hf_depth.dpt_depth,
        postprocess=bicubic_depth,
        fits_tiles=True,
        preprocess=DPT_384,
        taxonomy="scenes",
        options={"depth_kind": "inverse_relative"},
        license="Apache-2.0",
        paper="Ranftl et al. 2021, arXiv:2103.13413",
        weights=("hf:Intel/dpt-large",),
        extra=EXTRA,
    ),
    ModelSpec(
        name="midas_hybrid",
        task="depth",
        build=hf_depth.build_dpt_hybrid,
        num_classes=lambda taxonomy: 1,
        adapt=hf_depth.adapt_dpt,
        forward=hf_depth.dpt_depth,
        postprocess=bicubic_depth,
        fits_tiles=True,
        preprocess=DPT_384,
        taxonomy="scenes",
        options={"depth_kind": "inverse_relative"},
        license="Apache-2.0",
        paper="Ranftl et al. 2021, arXiv:2103.13413",
        weights=("hf:Intel/dpt-hybrid-midas",),
        extra=EXTRA,
    ),
    _depth_anything("depth_anything_v2", "inverse_relative", ("Small", "Base", "Large")),
    # A name for rooms and one for streets: with the other's max_depth their weights would be silently wrong.
    _depth_anything("depth_anything_v2_metric", "metric_m", METRIC_INDOOR, max_depth=20.0),
    _depth_anything("depth_anything_v2_metric_outdoor", "metric_m", METRIC_OUTDOOR, max_depth=80.0),
    ModelSpec(
        name="zoedepth",
        task="depth",
        build=hf_zoedepth.build_zoedepth,
        num_classes=lambda taxonomy: 1,
        adapt=hf_zoedepth.adapt_zoedepth,
        forward=hf_zoedepth.zoedepth,
        postprocess=bicubic_depth,
        preprocess=_whole(2048),
        taxonomy="scenes",
        options={"depth_kind": "metric_m"},
        license="MIT",
        paper="Bhat et al. 2023, arXiv:2302.12288",
        weights=("hf:Intel/zoedepth-nyu", "hf:Intel/zoedepth-nyu-kitti"),
        extra=EXTRA,
    ),
    ModelSpec(
        name="depth_pro",
        task="depth",
        build=hf_depth_pro.build_depth_pro,
        num_classes=lambda taxonomy: 1,
        adapt=hf_depth_pro.adapt_depth_pro,
        forward=hf_depth_pro.depth_pro,
        postprocess=disparity_resized,
        preprocess=_whole(3072),
        taxonomy="scenes",
        options={"depth_kind": "metric_m"},
        license="Apple's licence for research",
        commercial=False,
        paper="Bochkovskii et al. 2024, arXiv:2410.02073",
        weights=("hf:apple/DepthPro-hf",),
        extra=EXTRA,
    ),
)
