"""A batch that is cut in pieces has the loss and the gradient of the whole, however void is spread."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.losses.objective import DepthLoss, DepthLossOptions, SemanticLoss, SemanticLossOptions
from pipeline.training.losses.term import LossTerm, Objective, combine, no_loss

CPU = torch.device("cpu")
CLASSES = 4


def semantic(**options: Any) -> Objective:
    options = {"class_weights": (1.0, 2.0, 0.5, 3.0), "focal": 0.7, "dice": 0.5, "lovasz": 0.3} | options
    return SemanticLoss(SemanticLossOptions(**options), num_classes=CLASSES, device=CPU)


def depth(kind: str, **options: Any) -> Objective:
    return DepthLoss(DepthLossOptions(kind=kind, **options))  # type: ignore[arg-type]


OBJECTIVES: dict[str, tuple[Objective, int]] = {
    "semantic": (semantic(), CLASSES),
    "l1": (depth("l1"), 1),
    "l2": (depth("l2", max_depth=4.0), 1),
    "smooth_l1": (depth("smooth_l1"), 1),
    "silog": (depth("silog"), 1),
    "ssi robust": (depth("scale_shift_invariant", inverse=True), 1),
    "ssi least squares": (depth("scale_shift_invariant", alignment="least_squares"), 1),
}


def model(outputs: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Softplus(), nn.Conv2d(6, outputs, 1), nn.Softplus()).double()


def make_batch(size: int) -> dict[str, Tensor]:
    """Images whose share of void runs from nearly all to none; the second has no target at all."""
    generator = torch.Generator().manual_seed(2)
    image_BCHW = torch.randn(size, 3, 8, 9, generator=generator).double()
    semantic_BHW = torch.randint(0, CLASSES, (size, 8, 9), generator=generator)
    depth_BHW = 0.5 + 5 * torch.rand(size, 8, 9, generator=generator).double()
    void_BHW = torch.rand(size, 8, 9, generator=generator) > torch.linspace(0.1, 1, size)[:, None, None]
    void_BHW[1] = True
    return {
        "image": image_BCHW,
        "semantic": semantic_BHW.masked_fill(void_BHW, 255),
        "depth": depth_BHW.masked_fill(void_BHW, float("nan")),
        "pixel_weight": torch.rand(size, 8, 9, generator=generator).double(),
    }


def part(batch: Mapping[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    return {name: values[list(images)] for name, values in batch.items()}


def gradient(objective: Objective, outputs: int, batch: Mapping[str, Tensor], weights: Any = None) -> list[Tensor]:
    net = model(outputs)
    terms = objective.terms(net(batch["image"]), batch)
    return list(torch.autograd.grad(combine(terms, objective.factors, weights), list(net.parameters())))


@pytest.mark.parametrize(("objective", "outputs"), OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("cut", [((0, 1, 2), (3, 4, 5)), ((1,), (0, 2, 3, 4, 5)), ((5, 3), (0, 4), (1, 2))])
def test_workers_that_share_a_batch_have_its_gradient(
    objective: Objective, outputs: int, cut: Sequence[Sequence[int]]
) -> None:
    """As DistributedDataParallel does it: the mean over workers of their gradients, with the mean of their weights."""
    batch = make_batch(6)
    parts = [part(batch, images) for images in cut]
    weights = [objective.weights(piece) for piece in parts]
    shared = {name: torch.stack([weight[name] for weight in weights]).mean() for name in objective.factors}
    slopes = [gradient(objective, outputs, piece, shared) for piece in parts]
    for whole, *pieces in zip(gradient(objective, outputs, batch), *slopes, strict=True):
        torch.testing.assert_close(torch.stack(pieces).mean(0), whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("objective", "outputs"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_accumulated_gradients_are_those_of_the_whole(objective: Objective, outputs: int) -> None:
    batch = make_batch(6)
    parts = [part(batch, images) for images in ((0, 1), (2, 3), (4, 5))]
    weights = [objective.weights(piece) for piece in parts]
    summed = {name: torch.stack([weight[name] for weight in weights]).sum() for name in objective.factors}
    slopes = [gradient(objective, outputs, piece, summed) for piece in parts]
    for whole, *pieces in zip(gradient(objective, outputs, batch), *slopes, strict=True):
        torch.testing.assert_close(torch.stack(pieces).sum(0), whole, rtol=1e-6, atol=1e-9)


def test_the_mean_of_means_is_another_gradient() -> None:
    """What the two tests above would see if weights were left out."""
    objective, batch = semantic(), make_batch(6)
    means = [gradient(objective, CLASSES, part(batch, images)) for images in ((0, 1, 2), (3, 4, 5))]
    differences = [
        ((a + b) / 2 - whole).abs().max() / whole.abs().max()
        for whole, a, b in zip(gradient(objective, CLASSES, batch), *means, strict=True)
    ]
    assert max(differences) > 0.05


WHOLE = {"semantic of the batch as one": (semantic(per_image=False), CLASSES)}


@pytest.mark.parametrize(("objective", "outputs"), (OBJECTIVES | WHOLE).values(), ids=OBJECTIVES | WHOLE)
@pytest.mark.parametrize("images", [(0, 1, 2, 3, 4, 5), (1,), (0, 1)])
def test_weights_are_known_without_an_output(objective: Objective, outputs: int, images: Sequence[int]) -> None:
    batch = part(make_batch(6), images)
    terms = objective.terms(model(outputs)(batch["image"]), batch)
    weights = objective.weights(batch)
    assert set(terms) == set(weights) == set(objective.factors)
    for name, term in terms.items():
        assert float(term.weight) == pytest.approx(float(weights[name]), rel=1e-6)
        assert not term.weight.requires_grad


@pytest.mark.parametrize(("objective", "outputs"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_batch_without_targets_has_a_gradient_of_0_everywhere(objective: Objective, outputs: int) -> None:
    slopes = gradient(objective, outputs, part(make_batch(6), (1,)))
    assert all((slope == 0).all() for slope in slopes)


def test_combine_adds_means_by_their_factors() -> None:
    terms = {
        "a": LossTerm(torch.tensor(6.0), torch.tensor(3.0)),
        "b": LossTerm(torch.tensor(5.0), torch.tensor(2.0)),
        "c": LossTerm(torch.tensor(0.0), torch.tensor(0.0)),
    }
    factors = {"a": 1.0, "b": 2.0, "c": 9.0}
    assert float(combine(terms, factors)) == 6 / 3 + 2 * 5 / 2
    weights = {"a": torch.tensor(6.0), "b": torch.tensor(5.0), "c": torch.tensor(7.0)}
    assert float(combine(terms, factors, weights)) == 1 + 2


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_no_loss_is_0_whatever_the_values(value: float) -> None:
    values = torch.full((2, 3), value, requires_grad=True)
    zero = no_loss(values)
    zero.backward()
    assert float(zero.detach()) == 0
    assert values.grad is not None
    assert (values.grad == 0).all()
