"""Lovasz-softmax against its definition as an extension of a set function, written out here with sets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training.losses.lovasz import lovasz_softmax

LAW = settings(deadline=None, max_examples=40)
CLASSES = 4


def jaccard_loss(mispredicted: set[int], members: set[int]) -> float:
    """Berman et al. 2018: |M| / |{y = c} or M|, the Jaccard loss as a function of the mispredicted pixels."""
    return len(mispredicted) / len(members | mispredicted)


def lovasz_extension(errors: list[float], members: set[int]) -> float:
    """Sum over pixels, the largest error first, of error times what the pixel adds to the set function."""
    order = sorted(range(len(errors)), key=lambda pixel: -errors[pixel])
    total, taken, before = 0.0, set[int](), 0.0
    for pixel in order:
        taken.add(pixel)
        after = jaccard_loss(taken, members)
        total += errors[pixel] * (after - before)
        before = after
    return total


def defined(p_KN: np.ndarray, target_N: np.ndarray) -> float:
    known = np.flatnonzero(target_N != 255)
    p_KN, target_N = p_KN[:, known], target_N[known]
    losses = []
    for index in sorted(set(target_N.tolist())):
        members = set(np.flatnonzero(target_N == index).tolist())
        errors = [1 - p if n in members else p for n, p in enumerate(p_KN[index].tolist())]
        losses.append(lovasz_extension(errors, members))
    return float(np.mean(losses))


@LAW
@given(st.integers(0, 10**6), st.booleans())
def test_it_is_the_extension_of_the_jaccard_loss(seed: int, per_image: bool) -> None:
    rng = np.random.default_rng(seed)
    logits_BKHW = torch.from_numpy(rng.normal(size=(2, CLASSES, 3, 5)) * rng.choice([0.1, 1, 10]))
    target_BHW = torch.from_numpy(rng.choice([0, 1, 3, 255], (2, 3, 5)))
    target_BHW[:, 0, 0] = 1
    p_BKN, target_BN = logits_BKHW.softmax(1).flatten(2).numpy(), target_BHW.flatten(1).numpy()
    if per_image:
        expected = np.mean([defined(p_KN, target_N) for p_KN, target_N in zip(p_BKN, target_BN, strict=True)])
    else:
        expected = defined(np.concatenate(p_BKN, axis=1), target_BN.ravel())
    assert float(lovasz_softmax(logits_BKHW, target_BHW, per_image=per_image).mean()) == pytest.approx(expected, 1e-12)


@LAW
@given(st.integers(0, 10**6))
def test_hard_predictions_have_the_jaccard_loss_itself(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pred_N, target_N = rng.integers(0, CLASSES, 30), rng.integers(0, CLASSES, 30)
    logits_1K1N = torch.from_numpy(np.eye(CLASSES)[pred_N].T * 1e3)[None, :, None]
    ious = [
        ((pred_N == index) & (target_N == index)).sum() / ((pred_N == index) | (target_N == index)).sum()
        for index in np.unique(target_N)
    ]
    loss = lovasz_softmax(logits_1K1N, torch.from_numpy(target_N)[None, None]).mean()
    assert float(loss) == pytest.approx(1 - np.mean(ious), abs=1e-9)


def test_equal_errors_count_alike_in_any_order() -> None:
    target_N = torch.tensor([0, 1, 1, 0, 2, 1, 0, 255])
    values = [
        float(lovasz_softmax(torch.zeros(1, CLASSES, 1, 8, dtype=torch.float64), target_N[order][None, None]).mean())
        for order in (torch.randperm(8, generator=torch.Generator().manual_seed(n)) for n in range(10))
    ]
    assert values == pytest.approx([values[0]] * 10, rel=1e-12)


def test_a_million_pixels_keep_their_gradient_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    target_BHW = (torch.rand(1, 1000, 1000, generator=generator) < 0.3).long()
    logits_BKHW = torch.randn(1, 2, 1000, 1000, generator=generator, dtype=torch.float64)
    slopes = []
    for dtype in (torch.float32, torch.float64):
        # The same float32 values, so that both sort alike.
        values_BKHW = logits_BKHW.float().to(dtype).requires_grad_()
        slopes.append(torch.autograd.grad(lovasz_softmax(values_BKHW, target_BHW).mean(), values_BKHW)[0].double())
    error = (slopes[0] - slopes[1]).abs() / slopes[1].abs()
    assert float(error.quantile(0.99)) < 1e-4
