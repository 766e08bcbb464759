"""Where a model's backbone is and which stages it has: what learning rates fall along and what is frozen.

The rule: the backbone is the first submodule that exists of `backbone.body` (torchvision's detectors, where
`backbone.fpn` is new), `backbone` (torchvision's segmentation models), `encoder` (our U-Nets,
segmentation-models-pytorch), `dpt` (transformers' DPT) and where transformers' query models have theirs, or the one
that is named. Its stages are its direct children in the order in which they were registered, those without
parameters left out, a run of plain layers (a ResNet's conv1 and bn1) counting as one stage, and a child that is nothing
but a list of layers (a transformer's encoder) as its layers. So a ResNet has 5 (stem, layer1 to layer4),
MobileNetV3-Large 17, unet_small one per level, DPT-Large 25 (embeddings and 24 layers).
"""

from collections.abc import Sequence
from itertools import groupby

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from pipeline.errors import ConfigError

__all__ = ["backbone_stages", "freeze", "train_mode"]

CANDIDATES = (
    "backbone.body",
    "backbone",
    "encoder",
    "dpt",
    "model.backbone.model",
    "model.model.backbone.backbone",
    "model.pixel_level_module.encoder",
)


def backbone_stages(module: nn.Module, name: str = "") -> list[list[nn.Module]]:
    """The backbone's stages from the input on, each a list of modules.

    name: of the submodule, dotted, where the rule does not find it. Raises ConfigError where there is none.
    """
    backbone = _submodule(module, name)
    children = [
        layer for child in backbone.children() for layer in _layers(child) if any(True for _ in layer.parameters())
    ]
    plain = [not any(True for _ in child.children()) for child in children]
    # A key of its own for each container, one for a run of plain layers.
    keys = [-1 if is_plain else at for at, is_plain in enumerate(plain)]
    return [
        [child for _, child in group]
        for _, group in groupby(zip(keys, children, strict=True), key=lambda pair: pair[0])
    ]


def freeze(module: nn.Module, stages: int, name: str = "") -> None:
    """Let the first `stages` stages of the backbone learn no more, and everything else learn.

    May be called again with another number: head first with all stages frozen, then all with none. Gradients that
    frozen parameters still have are dropped, so that an optimiser passes over them. DistributedDataParallel notes what
    learns when it is built, so it must be built anew. `train_mode` sets the statistics of frozen stages.
    Raises ConfigError for more stages than there are.
    """
    module.requires_grad_(True)
    for child in _frozen(module, stages, name):
        child.requires_grad_(False)
        for parameter in child.parameters():
            parameter.grad = None


def train_mode(module: nn.Module, *, frozen_stages: int = 0, frozen_norms: bool = False, name: str = "") -> None:
    """`module.train()`, but for frozen stages, whose normalisation and dropout stay as in evaluation.

    frozen_norms: every batch normalisation uses its running statistics and keeps them, as where batches are too small
    to have any; its weight and bias go on learning.
    """
    module.train()
    for child in _frozen(module, frozen_stages, name):
        child.eval()
    if frozen_norms:
        for child in module.modules():
            if isinstance(child, _NormBase):
                child.eval()


def _layers(child: nn.Module) -> list[nn.Module]:
    """The members of a child that holds one list and nothing else, or the child itself."""
    held = [*child.children()]
    alone = len(held) == 1 and isinstance(held[0], nn.ModuleList) and not [*child.parameters(recurse=False)]
    return [*held[0].children()] if alone else [child]


def _frozen(module: nn.Module, stages: int, name: str) -> Sequence[nn.Module]:
    if stages == 0:
        return ()
    found = backbone_stages(module, name)
    if not 0 <= stages <= len(found):
        raise ConfigError(f"frozen_stages must be 0 to {len(found)}, the backbone's stages, got {stages}")
    return [child for stage in found[:stages] for child in stage]


def _submodule(module: nn.Module, name: str) -> nn.Module:
    for candidate in (name,) if name else CANDIDATES:
        try:
            return module.get_submodule(candidate)
        except AttributeError:
            continue
    children = ", ".join(child for child, _ in module.named_children())
    wanted = repr(name) if name else ", ".join(CANDIDATES[:-1]) + f" or {CANDIDATES[-1]}"
    raise ConfigError(f"expected a backbone at {wanted}, got a model of {children or type(module).__name__}")
