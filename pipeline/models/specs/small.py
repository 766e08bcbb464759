"""Models that need nothing but torch: the bundled one, and the one that measures everything else."""

from pipeline.models.spec import ModelSpec, Preprocess
from pipeline.models.zoo.null import Null
from pipeline.models.zoo.unet import UNetSmall

__all__ = ["SPECS"]

SPECS = (
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
)
