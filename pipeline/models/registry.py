"""Every model by name: one literal table."""

import importlib

from pipeline.errors import ConfigError
from pipeline.models.spec import ModelSpec, find
from pipeline.models.specs import classic, depth, detectors, merged, panoptic, promptable, regions, semantic

__all__ = ["MODELS", "find_model"]

FAMILIES = (
    semantic.SPECS,
    regions.SPECS,
    detectors.SPECS,
    panoptic.SPECS,
    depth.SPECS,
    promptable.SPECS,
    classic.SPECS,
)

ALONE = {spec.name: spec for family in FAMILIES for spec in family}
MODELS: dict[str, ModelSpec] = {**ALONE, **{spec.name: spec for spec in merged.specs(ALONE)}}


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
