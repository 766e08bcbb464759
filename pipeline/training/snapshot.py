"""What training goes on from, apart from where it is: weights, optimiser, gradient scale and averaged weights.

No generator's state is among it: order, augmentation and dropout follow from seed, epoch and step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.training.ema import Ema
from pipeline.training.state_tree import join_state, split_state

__all__ = ["capture", "put_back"]


def capture(
    module: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, ema: Ema | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """The tensors of the model (the averaged one, where there is one), those of the rest, and the rest's structure as
    JSON holds it. All are copies on the CPU."""
    state, tensors = split_state(
        {
            "optimizer": optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema_updates": None if ema is None else ema.updates,
            # Without an average the model's own weights are the ones that are kept for labelling.
            "module": None if ema is None else module.state_dict(),
        }
    )
    weights = (module if ema is None else ema.module).state_dict()
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
    """The inverse of `capture`. An average that the checkpoint lacks begins at its weights. Raises CheckpointError
    where the state is another model's or optimiser's."""
    try:
        tree = join_state(state, tensors)
        module.load_state_dict(tree["module"] or model)
        optimizer.load_state_dict(tree["optimizer"])
        if scaler is not None and tree["scaler"] is not None:
            scaler.load_state_dict(tree["scaler"])
        updates = tree["ema_updates"] or 0
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint does not fit the run: {' '.join(str(error).split())[:500]}") from error
    if ema is not None:
        ema.load_state_dict({"updates": updates, "module": model})
    _like_parameters(optimizer)


def _like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Averages in the memory format of their parameters, as an uninterrupted run has them: kernels for other strides
    may round differently."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
