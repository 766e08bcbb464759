"""Weights, gradients and optimiser state cut among the workers, for models that do not fit one accelerator with them.

FSDP (Zhao et al. 2023, arXiv:2304.11277) as torch.distributed.fsdp.fully_shard does it: every parameter is cut along
its first axis, and a worker keeps one part of it (a DTensor). The weights of a unit are gathered before its forward and
its backward pass and freed after it. Outside of these passes this module alone knows parts from wholes: a checkpoint, a
validation and whoever loads the model only ever see whole tensors.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.errors import ConfigError
from pipeline.training.backbone import backbone_stages
from pipeline.training.workers import Workers

__all__ = [
    "blueprint",
    "full_copy",
    "full_state",
    "load_full_state",
    "part_like",
    "shard",
    "shard_like",
    "shard_units",
    "whole",
]


def shard_units(module: nn.Module, backbone: str = "") -> list[nn.Module]:
    """The submodules whose weights are gathered and freed together, inner ones first: repeated blocks (children of a
    ModuleList that have children themselves, as a transformer's layers do) and the backbone's stages. Each holds what
    the units inside it do not.

    What is left belongs to the root and stays whole from a step's forward to its backward pass: heads, plain layers,
    and whatever shares a weight with another place. backbone: its name, where the rule of backbone.py does not find it;
    a model may have none. Raises ConfigError where there is none of that name.
    """
    stages: list[list[nn.Module]] = []
    with contextlib.nullcontext() if backbone else contextlib.suppress(ConfigError):
        stages = backbone_stages(module, backbone)
    blocks = [child for parent in module.modules() if isinstance(parent, nn.ModuleList) for child in parent]
    wanted = {child for stage in stages for child in stage} | set(blocks)
    uses = _uses(module)
    # A module comes before those inside it.
    return [
        child
        for child in reversed([*module.modules()])
        if child in wanted
        and type(child).forward is not nn.Module.forward  # a list of further blocks is never called
        and any(True for _ in child.children())
        and (own := _uses(child))
        and all(count == uses[parameter] for parameter, count in own.items())
    ]


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """At how many places each parameter is."""
    return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))


def shard(root: nn.Module, units: Sequence[nn.Module], workers: Workers, device: torch.device) -> None:
    """Cut the parameters of `root` in place, and move them to the device on the way, unit by unit: the whole model need
    not fit there. Its gradients are then the means over workers, as DistributedDataParallel's are.

    root: what is called in training. units: below it, as `shard_units` gives them. All workers call it, and all must
    call every unit as often. Raises ConfigError for parameters that have no axis.
    """
    scalars = [name for name, parameter in root.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ConfigError(
            f"strategy must be ddp where a parameter has no axis to be cut along, got fsdp with {scalars[0]!r}"
        )
    for parameter in root.parameters():
        # Parts lie along the first axis; inputs alone say whether convolutions run channels last.
        parameter.data = parameter.data.contiguous()
    group: Any = dist.group.WORLD if workers.group is None else workers.group
    mesh = DeviceMesh.from_group(group, device.type)
    for module in (*units, root):
        # Some versions' gloo gives the sum for the mean (pytorch/pytorch issue 162338), so only sums are asked for.
        fully_shard(module, mesh=mesh).set_force_sum_reduction_for_comms(True)


def blueprint(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode that takes no room: its parameters have a shape and no values (meta device)."""
    memo = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, memo).eval()


def full_copy(plan: nn.Module, module: nn.Module, device: torch.device) -> nn.Module:
    """A plain module with the whole weights of a sharded one, on each worker, whose device must have room for them. All
    workers call it; what they then do with it need not be the same.

    plan: the blueprint of `module`, made before it was sharded.
    """
    copied = copy.deepcopy(plan)
    copied.load_state_dict({name: whole(value) for name, value in module.state_dict().items()}, assign=True)
    return copied.to(device)


def shard_like(plain: nn.Module, module: nn.Module, device: torch.device) -> None:
    """Replace the parameters of a plain copy by copies of those that a sharded module has, in place."""
    parts = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    plain.load_state_dict(parts, strict=False, assign=True)
    plain.to(device)


def full_state(state: Mapping[Any, Any], *, keep: bool) -> dict[Any, Any]:
    """A state dict with whole tensors, on the CPU, in place of parts. Everything else is as it was.

    All workers call it, and all gather one tensor after the other. keep: whether this one wants the result; it is empty
    otherwise.
    """
    result = {}
    for name, value in state.items():
        gathered = whole(value).cpu() if isinstance(value, DTensor) else value
        if keep:
            result[name] = gathered
    return result


def load_full_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`module.load_state_dict` of whole tensors, of which a sharded module takes its parts. Every worker has them all.
    Raises RuntimeError where they do not fit."""
    own = module.state_dict()
    module.load_state_dict(
        {name: part_like(value, own[name]) if name in own else value for name, value in state.items()}
    )


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """What this worker holds of a whole tensor that is cut as another is; the tensor itself where that is whole."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """A tensor whose parts are gathered from all workers; itself where it is not cut. All workers call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
