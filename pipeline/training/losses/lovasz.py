"""The Lovasz-softmax loss: a surrogate of the Jaccard index that has a gradient.

Axes: B batch, K classes, H rows, W columns, N pixels of one image.
"""

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.training.losses.semantic import VOID, as_images, checked, evidence_images
from pipeline.training.losses.term import LossTerm, no_loss

__all__ = ["lovasz_softmax"]

# Sorts after every error of a valid pixel (they are 0 to 1).
LAST = -1.0


def lovasz_softmax(logits_BKHW: Tensor, target_BHW: Tensor, *, void_id: int = VOID, per_image: bool = True) -> LossTerm:
    """Lovasz-softmax over the classes present (Berman et al. 2018, arXiv:1705.08790, algorithm 1).

    Per image the mean over its classes, and the result is the sum over images, to be divided by the number of those
    with a valid pixel. per_image False: the batch counts as one image, as in the authors' runs on Pascal VOC; that loss
    depends on how a batch is cut among workers. It costs one sort of all pixels per class present.
    """
    logits_BKHW, target_BHW = as_images(checked(logits_BKHW, target_BHW), target_BHW, per_image)
    total = no_loss(logits_BKHW)
    for logits_KHW, target_HW in zip(logits_BKHW, target_BHW, strict=True):
        target_N = target_HW.flatten()
        valid_N = target_N != void_id
        classes = torch.unique(target_N[valid_N])
        if len(classes):
            p_KN = functional.softmax(logits_KHW.flatten(1), dim=0)[classes.long()]
            total = total + _lovasz(p_KN, target_N == classes[:, None], valid_N).mean()
    return LossTerm(total, evidence_images(target_BHW, total.dtype, void_id=void_id))


def _lovasz(p_KN: Tensor, member_KN: Tensor, valid_N: Tensor) -> Tensor:
    """The Lovasz extension of the Jaccard loss of each class, all of them present, at its errors |t - p|: (K).

    Errors are taken from the largest on; each counts for what its pixel adds to the Jaccard loss 1 - I / U of those
    taken so far. The steps are written out (the authors' code takes differences of the ratio, which in float32 leaves
    two digits of a step where an image has a million pixels): a pixel of the class takes 1 from I, one of another class
    adds 1 to U.
    """
    error_KN = torch.where(member_KN, 1 - p_KN, p_KN)
    order_KN = torch.where(valid_N, error_KN.detach(), LAST).argsort(dim=1, descending=True)
    member_KN = member_KN.gather(1, order_KN)
    missed_KN = member_KN.cumsum(1)
    count_K1 = missed_KN[:, -1:]
    left_KN = (count_K1 - missed_KN).to(p_KN.dtype)
    union_KN = (count_K1 + (~member_KN).cumsum(1)).to(p_KN.dtype)
    step_KN = torch.where(member_KN, 1 / union_KN, left_KN / (union_KN * (union_KN - 1).clamp_min(1)))
    # Void pixels sort last and count for nothing.
    error_KN = torch.where(valid_N, error_KN, 0).gather(1, order_KN)
    return (error_KN * step_KN).sum(1)
