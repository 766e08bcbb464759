"""Models that are made of others of the registry."""

from collections.abc import Mapping
from typing import Any

from pipeline.models.spec import ModelSpec
from pipeline.models.specs.panoptic import COCO_800
from pipeline.models.zoo import panoptic_merge
from pipeline.taxonomy import Taxonomy

__all__ = ["specs"]


def specs(parts: Mapping[str, ModelSpec]) -> tuple[ModelSpec, ...]:
    """parts: the models that they can be made of, by name."""

    def build(
        num_classes: int,
        taxonomy: Taxonomy,
        instance: Mapping[str, Any] | None = None,
        semantic: Mapping[str, Any] | None = None,
        overlap_threshold: float = 0.5,
        stuff_area: int = 64 * 64,
    ) -> panoptic_merge.PanopticMerge:
        return panoptic_merge.build_panoptic_merge(
            parts, taxonomy, instance, semantic, overlap_threshold=overlap_threshold, stuff_area=stuff_area
        )

    return (
        ModelSpec(
            name="panoptic_merge",
            task="panoptic",
            build=build,
            adapt=panoptic_merge.adapt_merge,
            forward=panoptic_merge.merge_forward,
            postprocess=panoptic_merge.merge_postprocess,
            losses=panoptic_merge.merge_losses,
            loss_factors=panoptic_merge.MERGE_LOSSES,
            at_step=panoptic_merge.merge_at_step,
            prompts=True,  # for parts that want them
            preprocess=COCO_800,
            taxonomy="coco_panoptic",
            # Of the default parts; others have their own.
            license="BSD-3-Clause",
            paper="Kirillov et al. 2019, arXiv:1801.00868",
        ),
    )
