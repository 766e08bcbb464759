"""From a run's config to what the loop is made of: model, objective, optimiser, schedule, augmentation."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipeline.config_train import TrainConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.licences import licence
from pipeline.models.load import LoadedModel, find_spec, find_taxonomy, load_model, stored_spec
from pipeline.models.spec import ModelSpec, Preprocess
from pipeline.models.weights import read_weights
from pipeline.redaction import without_secrets
from pipeline.taxonomy import Taxonomy
from pipeline.training.augment import AugmentOptions
from pipeline.training.border import BorderWeights
from pipeline.training.losses.objective import DepthLoss, DepthLossOptions, SemanticLoss, SemanticLossOptions
from pipeline.training.losses.own import OwnLosses
from pipeline.training.losses.term import Objective
from pipeline.training.optim import OptimizerOptions
from pipeline.training.schedule import ScheduleOptions

__all__ = [
    "augment_options",
    "border_weights",
    "model_spec",
    "objective",
    "optimizer_options",
    "schedule_options",
    "start_model",
    "to_device",
]

TILE_PIXELS = 1 << 22
# What only says how a model is run, and is no part of it.
RUN_OPTIONS = {"precision", "channels_last", "compile"}


def start_model(config: TrainConfig) -> tuple[LoadedModel, list[str]]:
    """The model as training begins, and the names of tensors that its weights did not fill (`partial_weights`).

    Raises what `load_model` raises, and CheckpointError where partial weights fit nowhere.
    """
    model = config.model
    if not config.partial_weights or model.weights == "none":
        return load_model(model, seed=config.seed, tile_pixels=TILE_PIXELS), []
    stored, spec = stored_spec(model), find_spec(model)
    empty = model.model_copy(
        update={
            "weights": "none",
            "name": None if model.spec else spec.name,
            "options": {**stored.get("options", {}), **stored.get("preprocess", {}), **model.options},
        }
    )
    taxonomy = find_taxonomy(model, stored, spec)
    loaded = load_model(empty, seed=config.seed, tile_pixels=TILE_PIXELS, taxonomy=taxonomy)
    wanted = loaded.module.state_dict()
    given = loaded.spec.adapt(read_weights(model.weights, model.storage), wanted.keys())
    fitting = {
        name: given[name] for name, tensor in wanted.items() if name in given and given[name].shape == tensor.shape
    }
    if not fitting:
        raise CheckpointError(f"{model.weights} has none of the tensors of {loaded.spec.name}")
    loaded.module.load_state_dict(fitting, strict=False)
    return loaded, [name for name in wanted if name not in fitting]


def model_spec(config: TrainConfig, model: LoadedModel) -> dict[str, Any]:
    """What of spec.json says which model it is; `load_model` builds the same from it, and from it alone, but for
    credentials among the options, which no file holds."""
    stored = stored_spec(config.model)
    # With the defaults written out: a later version may have others.
    parameters = inspect.signature(model.spec.build).parameters.values()
    defaults = {
        item.name: item.default for item in parameters if isinstance(item.default, bool | int | float | str | tuple)
    }
    options = without_secrets(
        {**defaults, **(model.spec.options or {}), **stored.get("options", {}), **config.model.options}
    )
    preprocess = {name: getattr(model.preprocess, name) for name in Preprocess.__dataclass_fields__}
    # What begins with weights for research alone stays for research alone.
    license_text, commercial = licence(model.spec, config.model.weights, stored)
    return {
        "format": 1,
        "model": model.spec.name,
        # Its content, bundled or not: an address means nothing elsewhere, and a later version's classes may be others.
        "taxonomy": model.taxonomy.describe(),
        "options": {name: value for name, value in options.items() if name not in {*RUN_OPTIONS, *preprocess}},
        "preprocess": preprocess,
        "license": license_text,
        "commercial": commercial,
    }


def objective(config: TrainConfig, model: LoadedModel, device: torch.device) -> Objective:
    """What is minimised: the model's own losses, else those of its task. Raises ConfigError."""
    if model.spec.losses is not None:
        return _own_losses(config, model.spec)
    if model.spec.task == "semantic":
        loss = config.loss.semantic
        names = {"cross_entropy", "focal", "dice", "lovasz", "focal_gamma", "per_image", "heads"}
        taxonomy = model.taxonomy
        options = SemanticLossOptions(
            **loss.model_dump(include=names),
            class_weights=_by_class(loss.class_weights, taxonomy, "class_weights"),
            focal_alpha=_by_class(loss.focal_alpha, taxonomy, "focal_alpha"),
        )
        return SemanticLoss(options, num_classes=len(taxonomy.categories), device=device, void_id=taxonomy.void_id)
    if model.spec.task == "depth":
        depth = config.target.depth
        return DepthLoss(
            DepthLossOptions(**config.loss.depth.model_dump(), min_depth=depth.min_depth, max_depth=depth.max_depth)
        )
    raise ConfigError(f"model {model.spec.name} is not trained here: it has no loss")


def _own_losses(config: TrainConfig, spec: ModelSpec) -> OwnLosses:
    unknown = sorted(set(config.loss.own) - set(spec.loss_factors))
    if unknown:
        raise ConfigError(f"loss.own: expected {', '.join(spec.loss_factors)}, got {', '.join(unknown)}")
    return OwnLosses(factors={**spec.loss_factors, **config.loss.own})


def border_weights(config: TrainConfig, model: LoadedModel) -> BorderWeights | None:
    """What examples are weighted by, None where they are not. Raises ConfigError."""
    loss, taxonomy = config.loss.semantic, model.taxonomy
    border = loss.border
    if border is None or model.spec.task != "semantic":
        return None
    if not loss.cross_entropy:
        raise ConfigError("loss.semantic.border weighs the cross-entropy, and loss.semantic.cross_entropy is 0")
    things = [category.id for category in taxonomy.categories if category.kind == "thing"]
    named = [_class_id(name, taxonomy, "border.classes") for name in border.classes]
    if not named and not things:
        raise ConfigError(f"loss.semantic.border.classes: expected some, as {taxonomy.name} has no things, got none")
    return BorderWeights(
        classes=frozenset(named or things),
        class_weights=_by_class(loss.class_weights, taxonomy, "class_weights") or (1.0,) * len(taxonomy.ids),
        void_id=taxonomy.void_id,
        w0=border.w0,
        sigma=border.sigma,
    )


def _by_class(weights: Mapping[str | int, float], taxonomy: Taxonomy, field: str) -> tuple[float, ...] | None:
    """One weight per class of the taxonomy, 1 where none is given; None where none is given at all."""
    if not weights:
        return None
    by_id: dict[int, float] = {}
    for name, weight in weights.items():
        id_ = _class_id(name, taxonomy, field)
        if id_ in by_id:
            raise ConfigError(f"loss.semantic.{field}: {taxonomy.by_id[id_].name!r} stands there twice")
        by_id[id_] = weight
    return tuple(by_id.get(id_, 1.0) for id_ in taxonomy.ids)


def _class_id(name: str | int, taxonomy: Taxonomy, field: str) -> int:
    """A class by its name, else by its id, which is text where it comes from the command line."""
    ids = {category.name: category.id for category in taxonomy.categories}
    found = ids.get(str(name), name)
    if isinstance(found, str) and found.isdecimal():
        found = int(found)
    if not isinstance(found, int) or found not in taxonomy.by_id:
        raise ConfigError(f"loss.semantic.{field}: {taxonomy.name} has no {name!r}; it has {', '.join(ids)}")
    return found


def augment_options(config: TrainConfig, model: LoadedModel) -> AugmentOptions:
    """What varies, on the size that the model's preprocessing gives."""
    preprocess = model.preprocess
    return AugmentOptions(
        **config.augment.model_dump(),
        resize=preprocess.resize,
        max_size=preprocess.max_size,
        void_id=model.taxonomy.void_id,
    )


def optimizer_options(config: TrainConfig) -> OptimizerOptions:
    return OptimizerOptions(**config.optimizer.model_dump())


def schedule_options(config: TrainConfig, steps_per_epoch: int) -> ScheduleOptions:
    """The schedule in steps. Raises ConfigError."""
    schedule = config.schedule
    return ScheduleOptions(
        **schedule.model_dump(include={"kind", "power", "gamma", "floor"}),
        steps=config.epochs * steps_per_epoch,
        milestones=tuple(round(epochs * steps_per_epoch) for epochs in schedule.milestones),
        warmup_steps=round(schedule.warmup_epochs * steps_per_epoch),
    )


def to_device(module: nn.Module, model: LoadedModel, device: torch.device) -> nn.Module:
    """On the device, in the memory format that the model asks for, learning."""
    memory_format = torch.channels_last if model.channels_last else torch.contiguous_format
    moved: nn.Module = module.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    return moved.requires_grad_(True)
