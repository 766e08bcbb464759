"""What a dense model is trained to: a sum of losses by options, over its output and its auxiliary heads.

Axes: B batch, K classes, H rows, W columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.training.losses.depth import PixelLoss, pixel_loss, silog, valid_depth
from pipeline.training.losses.lovasz import lovasz_softmax
from pipeline.training.losses.midas import Alignment, scale_shift_invariant
from pipeline.training.losses.semantic import VOID, cross_entropy, dice, evidence_images, focal, pixel_weights
from pipeline.training.losses.term import LossTerm, widened

__all__ = ["DepthLoss", "DepthLossOptions", "SemanticLoss", "SemanticLossOptions"]

SEMANTIC_LOSSES = ("cross_entropy", "focal", "dice", "lovasz")
# torchvision's reference training counts an auxiliary head's loss by half.
HEADS = {"out": 1.0, "aux": 0.5}
DepthLossKind = Literal["l1", "l2", "smooth_l1", "log_l1", "silog", "scale_shift_invariant"]


@dataclass(frozen=True, kw_only=True)
class SemanticLossOptions:
    """cross_entropy, focal, dice, lovasz: what each loss counts for; 0 = not computed.

    class_weights: one per class, of the cross-entropy. focal_alpha: one per class, of the focal loss. focal_gamma: 2,
    the paper's best. per_image: Dice and Lovasz of single images rather than of the batch as one; only that is the same
    however many workers share a batch. heads: what the losses of each head count for, by its name in the output; a
    model without heads has `out`.
    """

    cross_entropy: float = 1.0
    focal: float = 0.0
    dice: float = 0.0
    lovasz: float = 0.0
    class_weights: tuple[float, ...] | None = None
    focal_gamma: float = 2.0
    focal_alpha: tuple[float, ...] | None = None
    per_image: bool = True
    heads: Mapping[str, float] = field(default_factory=lambda: dict(HEADS))

    def __post_init__(self) -> None:
        factors = {name: getattr(self, name) for name in SEMANTIC_LOSSES}
        if min(factors.values()) < 0 or not any(factors.values()):
            raise ConfigError(f"losses must count for 0 or more, one of them for more than 0, got {factors}")
        if min(self.heads.values(), default=-1.0) < 0:
            raise ConfigError(f"heads must count for 0 or more, got {dict(self.heads)}")
        if self.focal_gamma < 0:
            raise ConfigError(f"focal_gamma must be 0 or more, got {self.focal_gamma}")
        for name, values in (("class_weights", self.class_weights), ("focal_alpha", self.focal_alpha)):
            if values is not None and (min(values, default=-1.0) < 0 or not any(values)):
                raise ConfigError(f"{name} must be 0 or more, one of them more than 0, got {values}")


class SemanticLoss:
    """An `Objective` of label maps. A batch's `semantic` is target_BHW (class indices, any integer type), and its
    `pixel_weight`, where there is one, what each pixel counts for in the cross-entropy, (B, H, W) float: in place of
    class weights, which are a summand of U-Net's map, not a factor."""

    def __init__(
        self, options: SemanticLossOptions, *, num_classes: int, device: torch.device, void_id: int = VOID
    ) -> None:
        """Raises ConfigError where class weights are not one per class."""
        for name, values in (("class_weights", options.class_weights), ("focal_alpha", options.focal_alpha)):
            if values is not None and len(values) != num_classes:
                raise ConfigError(f"{name} must have one value for each of {num_classes} classes, got {len(values)}")
        self.options = options
        self.num_classes = num_classes
        self.void_id = void_id
        self.factors = {name: getattr(options, name) for name in SEMANTIC_LOSSES if getattr(options, name)}
        self._class_weight_K = _vector(options.class_weights, device)
        self._alpha_K = _vector(options.focal_alpha, device)

    def terms(self, output: Tensor | Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, LossTerm]:
        """Each loss summed over the heads by what they count for.

        output: logits_BKHW, or several by the name of their head. Logits of a head that works at a whole fraction of
        the target's size are upsampled (bilinear). Raises ValueError for a head that the options do not name, or logits
        of any other size or number of classes.
        """
        heads = output if isinstance(output, Mapping) else {"out": output}
        unknown = sorted(set(heads) - set(self.options.heads))
        if unknown:
            raise ValueError(f"expected heads {sorted(self.options.heads)} (heads), got {', '.join(unknown)} as well")
        parts: dict[str, list[LossTerm]] = {name: [] for name in self.factors}
        for head, logits_BKHW in heads.items():
            if logits_BKHW.shape[1] != self.num_classes:
                raise ValueError(f"expected {self.num_classes} classes of head {head!r}, got {logits_BKHW.shape[1]}")
            sized_BKHW = _at_target_size(widened(logits_BKHW), batch["semantic"])
            for name in self.factors:
                term = self._term(name, sized_BKHW, batch)
                parts[name].append(LossTerm(self.options.heads[head] * term.total, term.weight))
        return {
            name: LossTerm(torch.stack([term.total for term in terms]).sum(), terms[0].weight)
            for name, terms in parts.items()
        }

    def weights(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        target_BHW: Tensor = batch["semantic"]
        images = evidence_images(target_BHW, torch.float32, void_id=self.void_id, per_image=self.options.per_image)
        weights = {
            "cross_entropy": pixel_weights(
                target_BHW, torch.float32, void_id=self.void_id, **self._counts(batch)
            ).sum(),
            "focal": (target_BHW != self.void_id).sum().float(),
            "dice": images,
            "lovasz": images,
        }
        return {name: weights[name] for name in self.factors}

    def _counts(self, batch: Mapping[str, Any]) -> dict[str, Tensor | None]:
        """What pixels count for in the cross-entropy: by their class, or each by itself."""
        own_BHW = batch.get("pixel_weight")
        return {"class_weight_K": self._class_weight_K if own_BHW is None else None, "pixel_weight_BHW": own_BHW}

    def _term(self, name: str, logits_BKHW: Tensor, batch: Mapping[str, Any]) -> LossTerm:
        target_BHW, options = batch["semantic"], self.options
        if name == "cross_entropy":
            return cross_entropy(logits_BKHW, target_BHW, void_id=self.void_id, **self._counts(batch))
        if name == "focal":
            return focal(
                logits_BKHW, target_BHW, void_id=self.void_id, gamma=options.focal_gamma, alpha_K=self._alpha_K
            )
        region = dice if name == "dice" else lovasz_softmax
        return region(logits_BKHW, target_BHW, void_id=self.void_id, per_image=options.per_image)


@dataclass(frozen=True, kw_only=True)
class DepthLossOptions:
    """kind: which loss. min_depth, max_depth: target pixels outside are not learned from, metres.

    inverse: the model gives 1 / depth (up to scale and shift), and the target is turned into that; for
        scale_shift_invariant, which the paper defines in that space. beta: metres, of smooth_l1. variance_focus: lambda
        of silog. alignment, trim, gradient_scales, gradient_factor: of scale_shift_invariant.
    """

    kind: DepthLossKind = "l1"
    min_depth: float = 1e-3
    max_depth: float | None = None
    inverse: bool = False
    beta: float = 1.0
    variance_focus: float = 0.5
    alignment: Alignment = "robust"
    trim: float = 0.2
    gradient_scales: int = 4
    gradient_factor: float = 0.5

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, DepthLossKind), ("alignment", self.alignment, Alignment)):
            if value not in get_args(known):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        if not 0 < self.min_depth < (float("inf") if self.max_depth is None else self.max_depth):
            raise ConfigError(f"expected 0 < min_depth < max_depth, got {self.min_depth} and {self.max_depth}")
        if not 0 <= self.trim < 1 or not 0 <= self.variance_focus <= 1:
            raise ConfigError(
                f"trim must be 0 or more and under 1, variance_focus 0 to 1, got {self.trim}, {self.variance_focus}"
            )
        if self.beta <= 0 or self.gradient_scales < 0 or self.gradient_factor < 0:
            raise ConfigError(
                "beta must be over 0, gradient_scales and gradient_factor 0 or more, got "
                f"{self.beta}, {self.gradient_scales}, {self.gradient_factor}"
            )


@dataclass(frozen=True)
class DepthLoss:
    """An `Objective` of depth maps. A batch's `depth` is depth_BHW in metres, NaN where it is unknown."""

    options: DepthLossOptions

    @property
    def factors(self) -> Mapping[str, float]:
        return {self.options.kind: 1.0}

    def terms(self, output: Tensor | Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, LossTerm]:
        """output: depth_B1HW or depth_BHW, or that as `out`. A map at a whole fraction of the target's size is
        upsampled (bilinear). Raises ValueError for any other size."""
        options = self.options
        values = output["out"] if isinstance(output, Mapping) else output
        values_B1HW = values[:, None] if values.ndim == 3 else values
        target_BHW: Tensor = batch["depth"]
        pred_BHW = _at_target_size(widened(values_B1HW), target_BHW)[:, 0]
        valid_BHW = self._valid(target_BHW)
        if options.inverse:
            target_BHW = 1 / target_BHW
        if options.kind == "scale_shift_invariant":
            term = scale_shift_invariant(
                pred_BHW,
                target_BHW,
                valid_BHW,
                alignment=options.alignment,
                trim=options.trim,
                gradient_scales=options.gradient_scales,
                gradient_factor=options.gradient_factor,
            )
        elif options.kind == "silog":
            term = silog(pred_BHW, target_BHW, valid_BHW, variance_focus=options.variance_focus)
        else:
            term = pixel_loss(pred_BHW, target_BHW, valid_BHW, kind=options.kind, beta=options.beta)
        return {options.kind: term}

    def weights(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        valid_BHW = self._valid(batch["depth"])
        by_pixel = self.options.kind in get_args(PixelLoss)
        evidence = valid_BHW if by_pixel else valid_BHW.flatten(1).any(1)
        return {self.options.kind: evidence.sum().float()}

    def _valid(self, target_BHW: Tensor) -> Tensor:
        return valid_depth(target_BHW, min_depth=self.options.min_depth, max_depth=self.options.max_depth)


def _vector(values: tuple[float, ...] | None, device: torch.device) -> Tensor | None:
    return None if values is None else torch.tensor(values, device=device)


def _at_target_size(values_BKHW: Tensor, target_BHW: Tensor) -> Tensor:
    """Upsampled by a whole factor where that gives the target's size; what does not fit is left for the loss to refuse.

    A model of valid convolutions answers for the middle of its input: stretching that would train it wrong in silence.
    """
    height, width = values_BKHW.shape[-2:]
    target_height, target_width = target_BHW.shape[-2:]
    factor = target_height // height
    if factor < 2 or (factor * height, factor * width) != (target_height, target_width):
        return values_BKHW
    return functional.interpolate(values_BKHW, size=(target_height, target_width), mode="bilinear")
