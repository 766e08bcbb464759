"""From a model's config to a module that is ready to predict, with everything that its version is made of."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.postprocess import POSTPROCESS, POSTPROCESS_VERSION
from pipeline.models.registry import find_model, import_spec
from pipeline.models.spec import ModelSpec, PostContext, Postprocess, Preprocess
from pipeline.models.weights import checkpoint_spec, fingerprint, load_weights, require_known
from pipeline.taxonomy import Taxonomy, load_taxonomy

__all__ = ["LoadedModel", "check_models", "load_model"]

PREPROCESS_OPTIONS = {field.name for field in dataclasses.fields(Preprocess)}
POST_OPTIONS = {field.name for field in dataclasses.fields(PostContext)} - {"taxonomy"}
RUN_OPTIONS = {"precision", "channels_last", "compile"}
DEPTH_KINDS = ("metric_m", "relative", "inverse_relative")
T = TypeVar("T")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in memory. `label` names it in the table; `version` changes with anything that changes its labels."""

    label: str
    version: str
    spec: ModelSpec
    module: nn.Module
    preprocess: Preprocess
    context: PostContext
    postprocess: Postprocess
    autocast: torch.dtype | None
    channels_last: bool
    compile: bool

    @property
    def taxonomy(self) -> Taxonomy:
        return self.context.taxonomy

    def describe(self) -> dict[str, Any]:
        """Plain values for run.json and for the driver, which holds no module."""
        return {
            "label": self.label,
            "name": self.spec.name,
            "version": self.version,
            "task": self.spec.task,
            "taxonomy": self.taxonomy.describe(),
            "license": self.spec.license,
            "commercial": self.spec.commercial,
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
        }


def find_spec(config: ModelConfig) -> ModelSpec:
    """The spec that a config names, directly or through its checkpoint. Raises UnknownModelError, ConfigError."""
    if config.spec:
        return import_spec(config.spec)
    if config.name:
        return find_model(config.name)
    checkpoint = checkpoint_spec(config.weights, config.storage)
    if checkpoint is None:
        raise ConfigError(f"weights {config.weights!r} do not name their model; give models.N.name")
    return find_model(checkpoint["model"])


def check_models(configs: tuple[ModelConfig, ...]) -> list[str]:
    """Labels of the models in the table, checked to be unique. Builds nothing."""
    labels = [config.label or find_spec(config).name for config in configs]
    for label in labels:
        if not label.replace("-", "").replace("_", "").replace(".", "").isalnum() or not label.isascii():
            raise ConfigError(f"a model's label may hold letters, digits, '-', '_' and '.', got {label!r}")
        if labels.count(label) > 1:
            raise ConfigError(f"two models are called {label!r} in the table; set models.N.label")
    return labels


def load_model(config: ModelConfig, *, seed: int, tile_pixels: int) -> LoadedModel:
    """Build, load weights, and fingerprint. The module is in eval mode on the CPU.

    Raises UnknownModelError, ConfigError (options, taxonomy), CheckpointError, StorageError.
    """
    spec = find_spec(config)
    where = f"options of model {config.label or spec.name!r}"
    checkpoint = checkpoint_spec(config.weights, config.storage) or {}
    if checkpoint and checkpoint["model"] != spec.name:
        raise CheckpointError(f"{config.weights} holds a {checkpoint['model']}, the config asks for {spec.name}")
    for name, kind in (("options", dict), ("preprocess", dict), ("taxonomy", str)):
        if not isinstance(checkpoint.get(name, kind()), kind):
            raise CheckpointError(
                f"{config.weights}/spec.json: {name} must be a {kind.__name__}, got {checkpoint[name]!r:.80}"
            )
    options = {**(spec.options or {}), **checkpoint.get("options", {}), **config.options}
    defaults = {name: parameter.default for name, parameter in inspect.signature(spec.build).parameters.items()}
    build_options = set(defaults) - {"num_classes", "args", "kwargs"}
    require_known(options, PREPROCESS_OPTIONS | POST_OPTIONS | RUN_OPTIONS | build_options, where)

    taxonomy = load_taxonomy(config.taxonomy or checkpoint.get("taxonomy") or spec.taxonomy, config.storage)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = spec.build(spec.num_classes(taxonomy), **{k: v for k, v in options.items() if k in build_options})
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"model {spec.name!r} cannot be built: {type(error).__name__}: {text} ({where})"
            ) from error
    load_weights(module, config.weights, config.storage)
    module.eval().requires_grad_(False)

    preprocess = _replaced(spec.preprocess, {**checkpoint.get("preprocess", {}), **options}, where)
    context = _replaced(PostContext(taxonomy=taxonomy), options, where)
    precision = options.get("precision", "fp32")
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r} ({where})")
    for name in ("channels_last", "compile"):
        if not isinstance(options.get(name, False), bool):
            raise ConfigError(f"{name} must be true or false, got {options[name]!r} ({where})")
    settings = {
        "name": spec.name,
        "postprocess": POSTPROCESS_VERSION,
        "taxonomy": [[c.id, c.name] for c in taxonomy.categories],
        "preprocess": dataclasses.asdict(preprocess),
        "context": {name: getattr(context, name) for name in sorted(POST_OPTIONS)},
        # With the defaults, so that a default written out is no other model.
        "options": {
            name: options.get(name, defaults[name])
            for name in sorted(build_options)
            if name in options or isinstance(defaults[name], bool | int | float | str)
        },
        "precision": precision,
        "tile_pixels": tile_pixels if spec.dense else 0,
    }
    return LoadedModel(
        label=config.label or spec.name,
        version=fingerprint(module, settings),
        spec=spec,
        module=module,
        preprocess=preprocess,
        context=context,
        postprocess=spec.postprocess or POSTPROCESS[spec.task],
        autocast=PRECISIONS[precision],
        channels_last=bool(options.get("channels_last", True)),
        compile=bool(options.get("compile", False)),
    )


def _replaced(value: T, options: Mapping[str, Any], where: str) -> T:
    """`value` with the options that are its fields, each checked against the field's type and range."""
    changes = {
        field.name: _checked(field.name, field.type, options[field.name], where)
        for field in dataclasses.fields(value)  # type: ignore[arg-type]
        if field.name in options and field.name != "taxonomy"
    }
    return dataclasses.replace(value, **changes)  # type: ignore[type-var]


def _checked(name: str, kind: Any, option: Any, where: str) -> Any:
    kinds = get_args(kind) or (kind,)  # int | None; the means and deviations are the only tuples
    number = isinstance(option, int | float) and not isinstance(option, bool) and math.isfinite(option)
    if float in kinds and name in ("mean", "std"):
        if not isinstance(option, list | tuple) or len(option) != 3:
            raise ConfigError(f"{name} must be three numbers, got {option!r} ({where})")
        return tuple(_checked(f"{name}[{index}]", float, item, where) for index, item in enumerate(option))
    if option is None and type(None) in kinds:
        return None
    if bool in kinds:
        right, expected = isinstance(option, bool), "true or false"
    elif name == "depth_kind":
        right, expected = option in DEPTH_KINDS, f"one of {', '.join(DEPTH_KINDS)}"
    elif int in kinds:
        right, expected = number and isinstance(option, int) and option > 0, "a whole number above 0"
    elif name.startswith("std"):
        right, expected = number and option > 0, "a number above 0"
    elif name in ("score_threshold", "low_confidence"):
        right, expected = number and 0 <= option <= 1, "a number from 0 to 1"
    else:
        right, expected = number, "a number"
    if not right:
        raise ConfigError(f"{name} must be {expected}, got {option!r} ({where})")
    return float(option) if float in kinds else option
