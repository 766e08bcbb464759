"""From a model's config to a module that is ready to predict, with everything that its version is made of."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import torch
from torch import nn

from pipeline.config import ModelConfig, RefineStage, TtaConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.licences import licence
from pipeline.models.postprocess import POSTPROCESS, POSTPROCESS_VERSION
from pipeline.models.quantize import QUANTIZED, quantize
from pipeline.models.registry import find_model, import_spec
from pipeline.models.spec import ModelSpec, PostContext, Postprocess, Preprocess
from pipeline.models.weights import CheckpointSpec, checkpoint_spec, fingerprint, load_weights, require_known
from pipeline.redaction import redact_text, remember, without_secrets
from pipeline.taxonomy import Taxonomy, build_taxonomy, load_taxonomy

__all__ = ["LoadedModel", "check_models", "find_spec", "find_taxonomy", "load_model", "stored_spec"]

PREPROCESS_OPTIONS = {field.name for field in dataclasses.fields(Preprocess)}
POST_OPTIONS = {field.name for field in dataclasses.fields(PostContext)} - {"taxonomy"}
RUN_OPTIONS = {"precision", "channels_last", "compile"}
DEPTH_KINDS = ("metric_m", "relative", "inverse_relative")
# Part of the model_version of a model that is refined or augmented: raise it when their labels would change.
STAGES_VERSION = 1
T = TypeVar("T")
# By what autocast runs in. The others do not: tf32 is a way of NVIDIA's matrix units, int8 a change of the weights.
PRECISIONS = {
    "fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16, **dict.fromkeys(QUANTIZED),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in memory. `label` names it in the table; `version` changes with anything that changes its labels.

    weights: the address that they were read from, with the commit where it names a repository. checkpoint: what their
    spec.json says, empty where they are no checkpoint. refine: stages that
    follow a semantic model. tta: the views that a semantic or depth model's output is the mean of; None: one.
    """

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
    precision: str = "fp32"
    weights: str = "none"
    checkpoint: CheckpointSpec = dataclasses.field(default_factory=dict)
    refine: tuple[RefineStage, ...] = ()
    tta: TtaConfig | None = None

    @property
    def taxonomy(self) -> Taxonomy:
        return self.context.taxonomy

    def describe(self) -> dict[str, Any]:
        """Plain values for run.json and for the driver, which holds no module."""
        license_text, commercial = licence(self.spec, self.weights, self.checkpoint)
        return {
            "label": self.label,
            "name": self.spec.name,
            "version": self.version,
            "task": self.spec.task,
            "taxonomy": self.taxonomy.describe(),
            "weights": redact_text(self.weights),
            "license": license_text,
            "commercial": commercial,
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


def stored_spec(config: ModelConfig) -> CheckpointSpec:
    """What the checkpoint that a config's weights name says of its model, empty where they name no checkpoint.

    `options`, `preprocess`, `taxonomy`: as far as it has them, of the right type. Raises CheckpointError, StorageError.
    """
    checkpoint = checkpoint_spec(config.weights, config.storage) or {}
    for name, kinds in (("options", (dict,)), ("preprocess", (dict,)), ("taxonomy", (str, dict))):
        if name in checkpoint and not isinstance(checkpoint[name], kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise CheckpointError(
                f"{config.weights}/spec.json: {name} must be a {expected}, got {checkpoint[name]!r:.80}"
            )
    return checkpoint


def find_taxonomy(config: ModelConfig, checkpoint: CheckpointSpec, spec: ModelSpec) -> Taxonomy:
    """The model's label space: the config's, else the checkpoint's, else the spec's own.

    A checkpoint holds it whole, as `Taxonomy.describe` gives it, so that it is the same wherever the checkpoint is
    taken; bundled and older ones hold its name or address. Raises ConfigError, CheckpointError for a content that is no
    taxonomy, StorageError.
    """
    stored = checkpoint.get("taxonomy")
    if not isinstance(stored, dict) or config.taxonomy:
        return load_taxonomy(config.taxonomy or stored or spec.taxonomy, config.storage)
    try:
        return build_taxonomy(stored, f"{config.weights}/spec.json (taxonomy)")
    except ConfigError as error:
        raise CheckpointError(f"{error}"[:500]) from error


def load_model(config: ModelConfig, *, seed: int, tile_pixels: int, taxonomy: Taxonomy | None = None) -> LoadedModel:
    """Build, load weights, and fingerprint. The module is in eval mode on the CPU.

    taxonomy: instead of what `find_taxonomy` finds. Raises UnknownModelError, ConfigError (options, taxonomy),
    CheckpointError, StorageError.
    """
    spec = find_spec(config)
    where = f"options of model {config.label or spec.name!r}"
    _check_stages(config, spec)
    checkpoint = stored_spec(config)
    if checkpoint and checkpoint["model"] != spec.name:
        raise CheckpointError(f"{config.weights} holds a {checkpoint['model']}, the config asks for {spec.name}")
    options = {**(spec.options or {}), **checkpoint.get("options", {}), **config.options}
    remember(options)
    defaults = {name: parameter.default for name, parameter in inspect.signature(spec.build).parameters.items()}
    build_options = set(defaults) - {"num_classes", "taxonomy", "args", "kwargs"}
    require_known(options, PREPROCESS_OPTIONS | POST_OPTIONS | RUN_OPTIONS | build_options, where)

    taxonomy = taxonomy or find_taxonomy(config, checkpoint, spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = spec.module(taxonomy, {name: options[name] for name in options if name in build_options})
        except Exception as error:
            kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
            text = " ".join(str(error).split())[:300]
            raise ConfigError(f"model {spec.name!r} cannot be built: {kind}{text} ({where})") from error
    weights = load_weights(module, config.weights, config.storage, spec.adapt)
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
        # With the defaults, so that a default written out is no other model; nor is another credential.
        "options": without_secrets(
            {
                name: options.get(name, defaults[name])
                for name in sorted(build_options)
                if name in options or isinstance(defaults[name], bool | int | float | str | tuple)
            }
        ),
        "precision": precision,
        "tile_pixels": tile_pixels if spec.tiled else 0,
    }
    tta = None if config.tta == TtaConfig() else config.tta
    # Only where there are any: without them the version is what it was before there were such stages.
    if config.refine:
        settings["refine"] = [STAGES_VERSION, *(stage.model_dump(mode="json") for stage in config.refine)]
    if tta is not None:
        settings["tta"] = [STAGES_VERSION, tta.model_dump(mode="json")]
    version = fingerprint(module, settings)
    if precision in QUANTIZED:
        quantize(module, precision, where)
    return LoadedModel(
        label=config.label or spec.name,
        version=version,
        spec=spec,
        module=module,
        preprocess=preprocess,
        context=context,
        postprocess=spec.postprocess or POSTPROCESS[spec.task],
        autocast=PRECISIONS[precision],
        channels_last=bool(options.get("channels_last", True)),
        compile=bool(options.get("compile", False)),
        precision=precision,
        weights=weights,
        checkpoint=checkpoint,
        refine=config.refine,
        tta=tta,
    )


def _check_stages(config: ModelConfig, spec: ModelSpec) -> None:
    """Raises ConfigError where the model is none that `refine` or `tta` can work on."""
    if config.refine and not (spec.task == "semantic" and spec.dense):
        own = "" if spec.task != "semantic" else " with a postprocess of its own"
        raise ConfigError(
            f"refine works on the logits of semantic models, {spec.name!r} is a model of task {spec.task}{own}"
        )
    if config.tta is None:
        return
    if not (spec.dense or spec.task == "depth"):
        own = " with a postprocess of its own" if spec.task == "semantic" else ""
        raise ConfigError(
            f"tta works on the maps of semantic and depth models, {spec.name!r} is a model of task {spec.task}{own}"
        )
    if config.tta.window is not None and not spec.dense:
        raise ConfigError(f"tta.window works on models that can see a part of an image, {spec.name!r} needs the whole")


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
