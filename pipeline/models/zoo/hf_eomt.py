"""EoMT from transformers (https://github.com/huggingface/transformers, Apache-2.0), built from options, and the
annealing of its masks in training.

Axes: B batch, C channels, H rows, W columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame
from pipeline.models.zoo.hf_universal import EXTRA, finished, mask2former, query_losses
from pipeline.models.zoo.universal_post import Queries
from pipeline.models.zoo.vgg import check_options

__all__ = ["anneal_masks", "annealing_windows", "build_eomt", "eomt", "eomt_losses"]

# The authors' windows in shares of the steps: from a sixth on, each layer's as long as that, the last one's end at five
# sixths (https://github.com/tue-mps/eomt, MIT, configs/dinov2). The exponent is that of their learning rate.
MASK_ANNEALING = (1 / 6, 5 / 6)
ANNEALING_POWER = 0.9


class SureMasks:
    """Mixed into the library's model: in prediction a layer's queries see by their masks all or none, as its
    probability is over a half or not, where the library would draw them at random."""

    training: bool

    def _disable_attention_mask(self, attn_mask: Tensor, prob: Tensor, **given: Any) -> Tensor:
        library: Any = super()
        if not self.training:
            # A query keeps its mask where a draw from 0 to 1 is at most this.
            prob = torch.where(prob > 0.5, 1.0, -1.0)
        mask: Tensor = library._disable_attention_mask(attn_mask, prob=prob, **given)
        return mask


def build_eomt(
    num_classes: int,
    image_size: int = 640,
    patch_size: int = 16,
    hidden_size: int = 1024,
    layers: int = 24,
    heads: int = 16,
    queries: int = 200,
    query_layers: int = 4,
    upscale_blocks: int = 2,
    points: int = 12544,
    mask_annealing: Sequence[float] = MASK_ANNEALING,
    mask_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
) -> nn.Module:
    """EoMT (Kerssies et al. 2025, arXiv:2503.19108): a plain vision transformer (DINOv2's) whose last layers have
    queries among their tokens; by default that of COCO's panoptic weights, ViT-L at 640 pixels.

    image_size: of the square that it sees, pixels; no other size is taken. query_layers: the last ones, which queries
    go through, each seeing the patches of its mask alone. upscale_blocks: doublings of the patches' resolution for the
    masks. mask_annealing: shares of a training's steps from which on the first of these layers, and from which on all
    of them, see every patch; none: as often as the weights say (always by their mask, where they are random). In
    prediction nothing is left to chance: a layer sees by its masks where its weights say so with a probability over
    one half, which published weights say of none. Options as in `build_mask2former`. Raises ValueError for options that
    make no sense, ConfigError without the extra.
    """
    check_options(num_classes, queries=queries, layers=layers, query_layers=query_layers, points=points)
    if query_layers > layers or image_size % patch_size:
        raise ValueError(
            f"query_layers must be at most {layers} and image_size a multiple of {patch_size}, "
            f"got {query_layers} and {image_size}"
        )
    windows = annealing_windows(query_layers, mask_annealing)
    library = import_extra("transformers", EXTRA)
    config = library.EomtConfig(
        num_labels=num_classes,
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_queries=queries,
        num_blocks=query_layers,
        num_upscale_blocks=upscale_blocks,
        train_num_points=points,
    )
    module: Any = type("Eomt", (SureMasks, library.EomtForUniversalSegmentation), {})(config)
    module.annealing_windows = windows
    return finished(module, mask_threshold, overlap_threshold)


def annealing_windows(layers: int, shares: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Each layer's first and last share of the steps in which it goes over from masks to all patches, in the order of
    the layers: of equal length and evenly spread over `shares`, from its first to its last; beyond four layers they
    overlap, as the authors' do for ViT-g. None for no shares. Raises ValueError where these are not two in ascending
    order."""
    if not len(shares):
        return ()
    if len(shares) != 2 or not 0 <= shares[0] < shares[1] <= 1:
        raise ValueError(f"mask_annealing must be two shares from 0 to 1 in ascending order, got {[*shares]}")
    first, last = shares
    length = (last - first) / min(layers, 4)
    spacing = (last - first - length) / max(layers - 1, 1)
    return tuple((first + at * spacing, first + at * spacing + length) for at in range(layers))


def anneal_masks(module: nn.Module, done: float) -> None:
    """Set the probability with which each layer's queries see the patches of their mask alone: 1 before its window,
    falling with the power 0.9 to 0 at its end (Kerssies et al. 2025, "mask annealing"). done: share of the steps, from
    0 to 1."""
    model: Any = module
    if model.annealing_windows:
        within = [min(max((done - begin) / (end - begin), 0.0), 1.0) for begin, end in model.annealing_windows]
        values = torch.tensor([(1 - share) ** ANNEALING_POWER for share in within])
        model.attn_mask_probs.copy_(values)


def eomt(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Queries:
    """What the queries say of a padded batch. Raises ValueError for another size than the model's own."""
    _check_square(module, image_BCHW)
    return mask2former(module, image_BCHW, frames)


def _check_square(module: nn.Module, image_BCHW: Tensor) -> None:
    model: Any = module
    size = model.config.image_size
    height, width = image_BCHW.shape[-2:]
    if (height, width) != (size, size):
        raise ValueError(
            f"expected an input of {size} x {size}, got {height} x {width}: resize and max_size must be at most, and "
            f"pad_multiple exactly, the model's image_size; so must a crop be in training"
        )


def eomt_losses(
    module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """`query_losses`. Raises ValueError for another size than the model's own."""
    _check_square(module, image_BCHW)
    return query_losses(module, image_BCHW, frames, targets)
