"""What training goes on from, apart from where it is: weights, optimiser, gradient scale and averaged weights.

No generator's state is among it: order, augmentation and dropout follow from seed, epoch and step. Nor is the number of
workers, or who of them had which part of the weights: tensors are whole.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.training.ema import Ema
from pipeline.training.sharding import full_state, load_full_state, part_like
from pipeline.training.state_tree import join_state, split_state

__all__ = ["capture", "put_back"]


def capture(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    ema: Ema | None,
    *,
    keep: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """The tensors of the model (the averaged one, where there is one), those of the rest, and the rest's structure as
    JSON holds it. All are copies on the CPU.

    All workers call it, as parts of tensors are gathered. keep: whether this one wants them; without, they are empty.
    """
    learned = optimizer.state_dict()
    learned["state"] = {at: full_state(values, keep=keep) for at, values in learned["state"].items()}
    state, tensors = split_state(
        {
            "optimizer": learned,
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema_updates": None if ema is None else ema.updates,
            # Without an average the model's own weights are the ones that are kept for labelling.
            "module": None if ema is None else full_state(module.state_dict(), keep=keep),
        }
    )
    weights = full_state((module if ema is None else ema.module).state_dict(), keep=keep)
    # Copies, because safetensors refuses tensors that share memory.
    model = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in weights.items()}
    return model, tensors, state


def put_back(
    model: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    state: Any,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    ema: Ema | None,
) -> None:
    """The inverse of `capture`, on every worker. An average that the checkpoint lacks begins at its weights. Raises
    CheckpointError where the state is another model's or optimiser's."""
    try:
        tree = join_state(state, tensors)
        load_full_state(module, tree["module"] or model)
        learned = tree["optimizer"]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        learned["state"] = {at: _like(values, parameters[at]) for at, values in learned["state"].items()}
        optimizer.load_state_dict(learned)
        if scaler is not None and tree["scaler"] is not None:
            scaler.load_state_dict(tree["scaler"])
        updates = tree["ema_updates"] or 0
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint does not fit the run: {' '.join(str(error).split())[:500]}") from error
    if ema is not None:
        ema.load_state_dict({"updates": updates, "module": model})


def _like(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The optimiser's state of one parameter: averages are cut as it is, and in its memory format, as an uninterrupted
    run has them (kernels for other strides may round differently)."""
    averages = {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape
    }
    return {**state} | {
        name: torch.empty_like(parameter, dtype=value.dtype).copy_(part_like(value, parameter))
        for name, value in averages.items()
    }
