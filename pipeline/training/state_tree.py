"""Nested state of optimisers, scalers and averages as tensors and JSON, and back: bit for bit, nothing pickled."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError

__all__ = ["join_state", "split_state"]

PLAIN = (str, int, float, bool, type(None))


def split_state(state: Any, prefix: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """What JSON holds, with a reference in each tensor's place, and the tensors by that reference, copied to the CPU.

    Mappings (of any key), lists and tuples of plain values and tensors are taken. Raises TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            # A clone, because safetensors refuses tensors that share memory.
            tensors[path] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"mapping": [[key, walk(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [walk(item, f"{path}.{at}") for at, item in enumerate(value)]}
        if isinstance(value, PLAIN):
            return value
        raise TypeError(f"expected plain values and tensors in a state, got {type(value).__name__} at {path}")

    return walk(state, prefix), tensors


def join_state(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split_state`. Raises CheckpointError where the two do not belong together."""
    try:
        return _join(tree, tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"not a training state: {type(error).__name__}: {error}") from error


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return torch.as_tensor(tensors[value])
    if kind == "mapping":
        return {key: _join(item, tensors) for key, item in value}
    items = [_join(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items
