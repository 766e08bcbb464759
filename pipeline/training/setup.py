"""From a run's config to what the loop is made of: model, objective, optimiser, schedule, augmentation."""

import inspect
from typing import Any

import torch
from torch import nn

from pipeline.config_train import TrainConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.load import LoadedModel, find_spec, load_model
from pipeline.models.spec import Preprocess
from pipeline.models.weights import checkpoint_spec, read_weights
from pipeline.taxonomy import Taxonomy
from pipeline.training.augment import AugmentOptions
from pipeline.training.losses.instances import INSTANCE_LOSSES, InstanceLoss
from pipeline.training.losses.objective import DepthLoss, DepthLossOptions, SemanticLoss, SemanticLossOptions
from pipeline.training.losses.term import Objective
from pipeline.training.optim import OptimizerOptions
from pipeline.training.schedule import ScheduleOptions

__all__ = [
    "augment_options",
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
    stored = checkpoint_spec(model.weights, model.storage) or {}
    empty = model.model_copy(
        update={
            "weights": "none",
            "name": None if model.spec else find_spec(model).name,
            "taxonomy": model.taxonomy or stored.get("taxonomy"),
            "options": {**stored.get("options", {}), **stored.get("preprocess", {}), **model.options},
        }
    )
    loaded = load_model(empty, seed=config.seed, tile_pixels=TILE_PIXELS)
    given = read_weights(model.weights, model.storage)
    wanted = loaded.module.state_dict()
    fitting = {
        name: given[name] for name, tensor in wanted.items() if name in given and given[name].shape == tensor.shape
    }
    if not fitting:
        raise CheckpointError(f"{model.weights} has none of the tensors of {loaded.spec.name}")
    loaded.module.load_state_dict(fitting, strict=False)
    return loaded, [name for name in wanted if name not in fitting]


def model_spec(config: TrainConfig, model: LoadedModel) -> dict[str, Any]:
    """What of spec.json says which model it is; `load_model` builds the same from it."""
    stored = checkpoint_spec(config.model.weights, config.model.storage) or {}
    # With the defaults written out: a later version may have others.
    parameters = inspect.signature(model.spec.build).parameters.values()
    defaults = {item.name: item.default for item in parameters if isinstance(item.default, bool | int | float | str)}
    options = {**defaults, **(model.spec.options or {}), **stored.get("options", {}), **config.model.options}
    preprocess = {name: getattr(model.preprocess, name) for name in Preprocess.__dataclass_fields__}
    return {
        "format": 1,
        "model": model.spec.name,
        "taxonomy": config.model.taxonomy or stored.get("taxonomy") or model.spec.taxonomy,
        "options": {name: value for name, value in options.items() if name not in {*RUN_OPTIONS, *preprocess}},
        "preprocess": preprocess,
    }


def objective(config: TrainConfig, model: LoadedModel, device: torch.device) -> Objective:
    """What is minimised, by the model's task. Raises ConfigError."""
    if model.spec.task == "semantic":
        loss = config.loss.semantic
        names = {"cross_entropy", "focal", "dice", "lovasz", "focal_gamma", "per_image", "heads"}
        options = SemanticLossOptions(
            **loss.model_dump(include=names), class_weights=_class_weights(loss.class_weights, model.taxonomy)
        )
        taxonomy = model.taxonomy
        return SemanticLoss(options, num_classes=len(taxonomy.categories), device=device, void_id=taxonomy.void_id)
    if model.spec.task == "depth":
        depth = config.target.depth
        return DepthLoss(
            DepthLossOptions(**config.loss.depth.model_dump(), min_depth=depth.min_depth, max_depth=depth.max_depth)
        )
    unknown = sorted(set(config.loss.instance) - set(INSTANCE_LOSSES))
    if unknown:
        raise ConfigError(f"loss.instance: expected {', '.join(INSTANCE_LOSSES)}, got {', '.join(unknown)}")
    return InstanceLoss(factors={**INSTANCE_LOSSES, **config.loss.instance})


def _class_weights(weights: dict[str | int, float], taxonomy: Taxonomy) -> tuple[float, ...] | None:
    if not weights:
        return None
    ids = {category.name: category.id for category in taxonomy.categories}
    by_id = {ids.get(str(name), name): weight for name, weight in weights.items()}
    unknown = [name for name in by_id if name not in taxonomy.by_id]
    if unknown:
        raise ConfigError(
            f"loss.semantic.class_weights: {taxonomy.name} has no {unknown[0]!r}; it has {', '.join(ids)}"
        )
    return tuple(by_id.get(id_, 1.0) for id_ in taxonomy.ids)


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
