"""Losses of label maps equal torch's, torchvision's and their formulas; void leaves no trace in value or gradient."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from pipeline.training.losses.lovasz import lovasz_softmax
from pipeline.training.losses.semantic import cross_entropy, dice, focal
from pipeline.training.losses.term import LossTerm

LAW = settings(deadline=None, max_examples=25)
CLASSES = 5
CLASS_WEIGHT_K = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0])

Loss = Callable[[Tensor, Tensor], LossTerm]
LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "weighted cross_entropy": lambda logits, target: cross_entropy(logits, target, class_weight_K=CLASS_WEIGHT_K),
    "focal": focal,
    "focal under 1": lambda logits, target: focal(logits, target, gamma=0.5, alpha_K=CLASS_WEIGHT_K),
    "dice": dice,
    "dice of the batch": lambda logits, target: dice(logits, target, per_image=False),
    "lovasz": lovasz_softmax,
    "lovasz of the batch": lambda logits, target: lovasz_softmax(logits, target, per_image=False),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def batch(seed: int, *, size: int = 3, void: float = 0.3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random logits_BKHW and uint8 target_BHW; class 1 never occurs, one image lacks most classes."""
    generator = torch.Generator().manual_seed(seed)
    logits_BKHW = 3 * torch.randn(size, CLASSES, 4, 6, generator=generator, dtype=torch.float64)
    target_BHW = torch.tensor([0, 2, 3, 4])[torch.randint(0, 4, (size, 4, 6), generator=generator)]
    target_BHW[-1][target_BHW[-1] > 2] = 0
    target_BHW[torch.rand(size, 4, 6, generator=generator) < void] = 255
    target_BHW[:, 0, 0] = 0
    return logits_BKHW.to(dtype), target_BHW.to(torch.uint8)


@LAW
@given(st.integers(0, 10**6), st.sampled_from([torch.uint8, torch.int32, torch.int64]), st.booleans())
def test_cross_entropy_is_torchs(seed: int, dtype: torch.dtype, weighted: bool) -> None:
    logits_BKHW, target_BHW = batch(seed)
    weight_K = CLASS_WEIGHT_K if weighted else None
    expected = functional.cross_entropy(logits_BKHW, target_BHW.long(), weight_K, ignore_index=255)
    term = cross_entropy(logits_BKHW, target_BHW.to(dtype), class_weight_K=weight_K)
    torch.testing.assert_close(term.mean(), expected)


def log_softmax(logits_K: np.ndarray) -> np.ndarray:
    shifted = logits_K - logits_K.max()
    return shifted - math.log(np.exp(shifted).sum())


def test_pixel_weights_are_of_the_sum_and_the_divisor() -> None:
    logits_BKHW, target_BHW = batch(3)
    pixel_weight_BHW = torch.rand(target_BHW.shape, generator=torch.Generator().manual_seed(4))
    pixel_weight_BHW[target_BHW == 255] = math.nan  # whatever stands where there is no target
    term = cross_entropy(logits_BKHW, target_BHW, class_weight_K=CLASS_WEIGHT_K, pixel_weight_BHW=pixel_weight_BHW)
    total, weights = 0.0, 0.0
    for b, y, x in np.argwhere(target_BHW.numpy() != 255):
        index = int(target_BHW[b, y, x])
        weight = float(CLASS_WEIGHT_K[index]) * float(pixel_weight_BHW[b, y, x])
        total -= weight * log_softmax(logits_BKHW[b, :, y, x].double().numpy())[index]
        weights += weight
    assert float(term.total) == pytest.approx(total, rel=1e-5)
    assert float(term.weight) == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_of_two_classes_is_torchvisions(gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logit_BHW = 4 * torch.randn(2, 5, 7, generator=generator)
    target_BHW = torch.randint(0, 2, (2, 5, 7), generator=generator)
    expected = sigmoid_focal_loss(logit_BHW, target_BHW.float(), alpha=0.25, gamma=gamma, reduction="mean")
    logits_B2HW = torch.stack([torch.zeros_like(logit_BHW), logit_BHW], dim=1)
    term = focal(logits_B2HW, target_BHW, gamma=gamma, alpha_K=torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(term.mean(), expected)


@LAW
@given(st.integers(0, 10**6))
def test_focal_without_focus_is_cross_entropy(seed: int) -> None:
    logits_BKHW, target_BHW = batch(seed)
    torch.testing.assert_close(focal(logits_BKHW, target_BHW, gamma=0).mean(), cross_entropy(*batch(seed)).mean())


def naive_dice(p_KN: np.ndarray, target_N: np.ndarray) -> float:
    known = target_N != 255
    p_KN, target_N = p_KN[:, known], target_N[known]
    losses = []
    for index in np.unique(target_N):
        member_N = target_N == index
        losses.append(1 - 2 * p_KN[index][member_N].sum() / (p_KN[index].sum() + member_N.sum()))
    return float(np.mean(losses))


@LAW
@given(st.integers(0, 10**6))
def test_dice_is_its_formula_over_classes_present(seed: int) -> None:
    logits_BKHW, target_BHW = batch(seed)
    p_BKN = logits_BKHW.double().softmax(1).flatten(2).numpy()
    target_BN = target_BHW.flatten(1).numpy()
    images = [naive_dice(p_KN, target_N) for p_KN, target_N in zip(p_BKN, target_BN, strict=True)]
    assert float(dice(logits_BKHW, target_BHW).mean()) == pytest.approx(np.mean(images), rel=1e-5)
    whole = naive_dice(np.concatenate(p_BKN, axis=1), target_BN.ravel())
    assert float(dice(logits_BKHW, target_BHW, per_image=False).mean()) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("loss", [dice, lovasz_softmax])
def test_region_losses_go_from_1_to_0(loss: Loss) -> None:
    _, target_BHW = batch(1)
    right_BKHW = 50 * functional.one_hot(target_BHW.long() % 255, CLASSES).permute(0, 3, 1, 2).float()
    assert float(loss(right_BKHW, target_BHW).mean()) == pytest.approx(0, abs=1e-6)
    assert float(loss(right_BKHW.roll(1, 1), target_BHW).mean()) == pytest.approx(1, abs=1e-6)


def gradient(loss: Loss, logits_BKHW: Tensor, target_BHW: Tensor) -> tuple[Tensor, Tensor]:
    logits_BKHW = logits_BKHW.detach().requires_grad_()
    mean = loss(logits_BKHW, target_BHW).mean()
    return mean.detach(), torch.autograd.grad(mean, logits_BKHW)[0]


@every_loss
def test_void_pixels_leave_no_trace(loss: Loss) -> None:
    logits_BKHW, target_BHW = batch(5)
    void_BKHW = (target_BHW == 255)[:, None].expand_as(logits_BKHW)
    mean, slope_BKHW = gradient(loss, logits_BKHW, target_BHW)
    assert (slope_BKHW[void_BKHW] == 0).all()
    assert (slope_BKHW[~void_BKHW] != 0).any()
    other_BKHW = torch.where(void_BKHW, torch.randn_like(logits_BKHW) * 20, logits_BKHW)
    other_mean, other_BKHW = gradient(loss, other_BKHW, target_BHW)
    torch.testing.assert_close(other_mean, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(other_BKHW, slope_BKHW, rtol=1e-6, atol=0)


@every_loss
def test_no_valid_pixel_is_0_with_a_gradient_of_0(loss: Loss) -> None:
    logits_BKHW, target_BHW = batch(6)
    mean, slope_BKHW = gradient(loss, logits_BKHW, torch.full_like(target_BHW, 255))
    assert mean == 0
    assert (slope_BKHW == 0).all()
    term = loss(logits_BKHW, torch.full_like(target_BHW, 255))
    assert (float(term.total), float(term.weight)) == (0, 0)


@every_loss
def test_an_image_without_valid_pixels_changes_nothing(loss: Loss) -> None:
    logits_BKHW, target_BHW = batch(7)
    alone = loss(logits_BKHW[:2], target_BHW[:2]).mean()
    target_BHW[2] = 255
    torch.testing.assert_close(loss(logits_BKHW, target_BHW).mean(), alone)


@every_loss
@pytest.mark.parametrize("seed", range(2))
def test_gradients_are_those_of_finite_differences(loss: Loss, seed: int) -> None:
    logits_BKHW, target_BHW = batch(seed, size=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, target_BHW).mean(), logits_BKHW.requires_grad_())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_summed_in_float32(loss: Loss, dtype: torch.dtype, autocast: bool) -> None:
    """70,000 pixels: more than float16 can count, and far more than bfloat16's 8 bits."""
    generator = torch.Generator().manual_seed(0)
    logits_BKHW = (3 * torch.randn(1, CLASSES, 250, 280, generator=generator)).to(dtype)
    target_BHW = torch.randint(0, CLASSES, (1, 250, 280), generator=generator)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        term = loss(logits_BKHW, target_BHW)
    assert (term.total.dtype, term.weight.dtype) == (torch.float32, torch.float32)
    expected = loss(logits_BKHW.double(), target_BHW)
    torch.testing.assert_close(term.mean(), expected.mean().float(), rtol=2e-5, atol=0)
    _, slope_BKHW = gradient(loss, logits_BKHW, target_BHW)
    assert slope_BKHW.dtype == dtype
    assert slope_BKHW.isfinite().all()


@every_loss
def test_logits_of_any_size_have_finite_losses_and_gradients(loss: Loss) -> None:
    logits_BKHW, target_BHW = batch(8)
    for scale in (0.0, 1e3, 1e30):
        mean, slope_BKHW = gradient(loss, logits_BKHW * scale, target_BHW)
        assert mean.isfinite()
        assert slope_BKHW.isfinite().all()


@every_loss
def test_logits_of_another_size_are_refused(loss: Loss) -> None:
    logits_BKHW, target_BHW = batch(0)
    with pytest.raises(ValueError, match=r"expected logits of 3 x K x 4 x 5, got 3 x 5 x 4 x 6"):
        loss(logits_BKHW, target_BHW[..., :5])
