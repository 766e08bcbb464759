"""Losses of label maps: cross-entropy, focal and Dice. Lovasz-softmax has a file of its own.

Axes: B batch, K classes, H rows, W columns. Targets hold class indices 0..K-1 or `void_id`, in any integer type; void
pixels have no gradient and are in no divisor. An index that is neither raises IndexError on the CPU and stops a CUDA
device, so it is refused where targets are read (pipeline/training/targets.py).
"""

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.training.losses.term import LossTerm, widened

__all__ = ["VOID", "cross_entropy", "dice", "evidence_images", "focal", "pixel_weights"]

VOID = 255
# Under it 1 - p counts as 0: for gamma < 1 the derivative of (1 - p) ** gamma is infinite there.
SMALLEST_MISS = 1e-12


def pixel_weights(
    target_BHW: Tensor,
    dtype: torch.dtype,
    *,
    void_id: int = VOID,
    class_weight_K: Tensor | None = None,
    pixel_weight_BHW: Tensor | None = None,
) -> Tensor:
    """What each pixel counts for, (B, H, W): 0 for void, else its class's weight times its own (1 by default)."""
    valid_BHW = target_BHW != void_id
    weight_BHW = valid_BHW.to(dtype)
    if class_weight_K is not None:
        weight_BHW = weight_BHW * class_weight_K.to(dtype)[_indices(target_BHW, valid_BHW)]
    if pixel_weight_BHW is not None:
        weight_BHW = torch.where(valid_BHW, weight_BHW * pixel_weight_BHW.to(dtype), 0)
    return weight_BHW


def cross_entropy(
    logits_BKHW: Tensor,
    target_BHW: Tensor,
    *,
    void_id: int = VOID,
    class_weight_K: Tensor | None = None,
    pixel_weight_BHW: Tensor | None = None,
) -> LossTerm:
    """Softmax cross-entropy in nats: the sum of w * -log p over the pixels, to be divided by the sum of w.

    w is what `pixel_weights` gives, so that with class weights alone the mean is torch's own `cross_entropy`, and with
    `pixel_weight_BHW` the weighted loss of U-Net (Ronneberger et al. 2015, eq. 1), there a plain sum.
    """
    logits_BKHW = checked(logits_BKHW, target_BHW)
    weight_BHW = pixel_weights(
        target_BHW,
        logits_BKHW.dtype,
        void_id=void_id,
        class_weight_K=class_weight_K,
        pixel_weight_BHW=pixel_weight_BHW,
    )
    loss_BHW = functional.cross_entropy(logits_BKHW, target_BHW.long(), ignore_index=void_id, reduction="none")
    return LossTerm((loss_BHW * weight_BHW).sum(), weight_BHW.sum())


def focal(
    logits_BKHW: Tensor,
    target_BHW: Tensor,
    *,
    void_id: int = VOID,
    gamma: float = 2.0,
    alpha_K: Tensor | None = None,
) -> LossTerm:
    """Focal loss, -alpha (1 - p)^gamma log p of the target's class (Lin et al. 2017, arXiv:1708.02002, eq. 5), with p
    from a softmax instead of one sigmoid per class; for two classes that is the same.

    The sum over the pixels, to be divided by the number of valid ones (RetinaNet divides by its anchors with an object,
    which a label map does not have). alpha_K: by class; unlike weights of `cross_entropy` it is in no divisor.
    """
    logits_BKHW = checked(logits_BKHW, target_BHW)
    valid_BHW = target_BHW != void_id
    index_BHW = _indices(target_BHW, valid_BHW)
    log_p_BHW = functional.log_softmax(logits_BKHW, dim=1).gather(1, index_BHW[:, None])[:, 0]
    miss_BHW = (-torch.expm1(log_p_BHW)).clamp_min(SMALLEST_MISS)
    loss_BHW = -(miss_BHW**gamma) * log_p_BHW
    if alpha_K is not None:
        loss_BHW = loss_BHW * alpha_K.to(loss_BHW.dtype)[index_BHW]
    return LossTerm(torch.where(valid_BHW, loss_BHW, 0).sum(), valid_BHW.sum().to(loss_BHW.dtype))


def dice(logits_BKHW: Tensor, target_BHW: Tensor, *, void_id: int = VOID, per_image: bool = True) -> LossTerm:
    """Soft Dice loss: 1 - 2 sum(p t) / (sum(p) + sum(t)) over valid pixels, averaged over the classes present.

    After Milletari et al. 2016 (arXiv:1606.04797, section 3), whose divisor has squares where most code since, as here,
    has plain sums. A class that the target lacks is left out, so that no smoothing constant is needed.

    per_image: sums are over one image, and the result is the sum over images, to be divided by the number of those
    with a valid pixel. Otherwise the batch counts as one image; that loss depends on how a batch is cut among workers.
    """
    logits_BKHW, target_BHW = as_images(checked(logits_BKHW, target_BHW), target_BHW, per_image)
    valid_BHW = target_BHW != void_id
    p_BKHW = functional.softmax(logits_BKHW, dim=1) * valid_BHW[:, None]
    # Void is no index of a class, so that no class has it.
    member_BKHW = target_BHW[:, None] == torch.arange(logits_BKHW.shape[1], device=target_BHW.device)[:, None, None]
    member_BKHW = member_BKHW & valid_BHW[:, None]
    count_BK = member_BKHW.sum((2, 3)).to(p_BKHW.dtype)
    both_BK = (p_BKHW * member_BKHW).sum((2, 3))
    present_BK = count_BK > 0
    # An absent class has a divisor of its own, so that neither it nor its gradient is 0 / 0.
    ratio_BK = 2 * both_BK / torch.where(present_BK, p_BKHW.sum((2, 3)) + count_BK, 1)
    loss_B = torch.where(present_BK, 1 - ratio_BK, 0).sum(1) / present_BK.sum(1).clamp_min(1)
    return LossTerm(loss_B.sum(), evidence_images(target_BHW, loss_B.dtype, void_id=void_id))


def evidence_images(target_BHW: Tensor, dtype: torch.dtype, *, void_id: int = VOID, per_image: bool = True) -> Tensor:
    """How many images have a valid pixel, a scalar; at most 1 where the batch counts as one image."""
    count = (target_BHW != void_id).flatten(1).any(1).sum()
    return (count if per_image else count.clamp_max(1)).to(dtype)


def checked(logits_BKHW: Tensor, target_BHW: Tensor) -> Tensor:
    """The logits in float32 or wider. Raises ValueError where they are not of the target's size."""
    if logits_BKHW.ndim != 4 or logits_BKHW.shape[:1] + logits_BKHW.shape[2:] != target_BHW.shape:
        expected = " x ".join(map(str, (target_BHW.shape[0], "K", *target_BHW.shape[1:])))
        raise ValueError(f"expected logits of {expected}, got {' x '.join(map(str, logits_BKHW.shape))}")
    return widened(logits_BKHW)


def as_images(logits_BKHW: Tensor, target_BHW: Tensor, per_image: bool) -> tuple[Tensor, Tensor]:
    """The batch as it is, or as one image with all of its rows."""
    if per_image:
        return logits_BKHW, target_BHW
    return logits_BKHW.transpose(0, 1).flatten(1, 2)[None], target_BHW.flatten(0, 1)[None]


def _indices(target_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """Class indices as int64; void becomes class 0, so that it can index anything."""
    return torch.where(valid_BHW, target_BHW, 0).long()
