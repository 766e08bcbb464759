"""Models of anything: masks without classes, from prompts or of the whole image."""

from pipeline.models.spec import ModelSpec, Preprocess
from pipeline.models.zoo import grounded_sam, sam, sam3

__all__ = ["SPECS"]

# The long side is 1024 whatever the image, and every input a square, so that all images share their batches.
SAM_1024 = Preprocess(resize=1024, max_size=1024, pad_multiple=1024)
# Masks have been tested already when they arrive, and there may be hundreds.
KEEP_ALL = {"score_threshold": 0.0, "max_segments": 1000}

SPECS = (
    ModelSpec(
        name="sam",
        task="instance",
        build=sam.build_sam,
        adapt=sam.adapt_sam,
        forward=sam.segment,
        postprocess=sam.segments,
        prompts=True,
        preprocess=SAM_1024,
        taxonomy="objects",
        options=KEEP_ALL,
        license="Apache-2.0",
        paper="Kirillov et al. 2023, arXiv:2304.02643",
        weights=("hf:facebook/sam-vit-base", "hf:facebook/sam-vit-large", "hf:facebook/sam-vit-huge"),
        extra=sam.EXTRA,
    ),
    ModelSpec(
        name="sam2",
        task="instance",
        build=sam.build_sam2,
        adapt=sam.adapt_sam2,
        forward=sam.segment,
        postprocess=sam.segments,
        prompts=True,
        preprocess=SAM_1024,
        taxonomy="objects",
        options=KEEP_ALL,
        license="Apache-2.0",
        paper="Ravi et al. 2024, arXiv:2408.00714",
        weights=(
            "hf:facebook/sam2.1-hiera-tiny",
            "hf:facebook/sam2.1-hiera-small",
            "hf:facebook/sam2.1-hiera-base-plus",
            "hf:facebook/sam2.1-hiera-large",
        ),
        extra=sam.EXTRA,
    ),
    ModelSpec(
        name="grounded_sam2",
        task="instance",
        build=grounded_sam.build_grounded_sam2,
        adapt=grounded_sam.adapt_grounded,
        forward=grounded_sam.find,
        postprocess=sam.segments,
        prompts=True,
        # Grounding DINO's; SAM 2's square is made from it.
        preprocess=Preprocess(resize=800, max_size=1333, pad_multiple=32),
        taxonomy="coco80",
        # Its boxes have passed its own threshold.
        options={"score_threshold": 0.0, "max_segments": 300},
        license="Apache-2.0",
        paper="Ren et al. 2024, arXiv:2401.14159; Liu et al. 2023, arXiv:2303.05499",
        extra=grounded_sam.EXTRA,
    ),
    ModelSpec(
        name="sam3",
        task="instance",
        build=sam3.build_sam3,
        adapt=sam3.adapt_sam3,
        forward=sam3.find_concepts,
        postprocess=sam.segments,
        prompts=True,
        preprocess=Preprocess(resize=1008, max_size=1008, pad_multiple=1008, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        taxonomy="coco80",
        options=KEEP_ALL,
        # Commercial use is allowed, military use and some others are not.
        license="SAM License",
        paper="Carion et al. 2025, arXiv:2511.16719",
        weights=("hf:facebook/sam3",),
        extra=sam3.EXTRA,
    ),
)
