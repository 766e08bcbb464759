"""The recurrent network: passes written out, what a pass adds to what a pixel depends on, and what is trained."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.zoo.recurrent_cnn import RecurrentCNN
from pipeline.training.losses.objective import SemanticLoss, SemanticLossOptions


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(num_classes: int = 4, passes: int = 3, **options: Any) -> RecurrentCNN:
    torch.manual_seed(0)
    return RecurrentCNN(num_classes, passes, **{"width": 4, "kernel": 3, **options}).eval()


def test_parameters() -> None:
    """No more for more passes: two layers of filters over image and scores, and the scores."""
    for passes in (1, 5):
        module = RecurrentCNN(8, passes)
        assert sum(p.numel() for p in module.parameters()) == 49 * 11 * 25 + 25 + 49 * 25 * 50 + 50 + 50 * 8 + 8


@torch.inference_mode()
def test_each_pass_gets_the_scores_of_the_one_before() -> None:
    module, image = build(), torch.randn(2, 3, 16, 24)
    output = module(image)
    assert list(output) == ["out", "pass1", "pass2"]
    first = module.net(torch.cat([image, torch.zeros(2, 4, 16, 24)], 1))
    assert first.shape == (2, 4, 4, 6)
    torch.testing.assert_close(output["pass1"], first)
    scores = first
    for name in ("pass2", "out"):
        fed = functional.interpolate(scores, scale_factor=4, mode="bilinear")
        scores = module.net(torch.cat([image, fed], 1))
        if name == "out":
            scores = functional.interpolate(scores, scale_factor=4, mode="bilinear")
        torch.testing.assert_close(output[name], scores)


@torch.inference_mode()
def test_one_pass_is_the_plain_network() -> None:
    image = torch.randn(1, 3, 16, 16)
    plain, recurrent = build(passes=1)(image), build(passes=3)(image)
    assert list(plain) == ["out"]
    expected = functional.interpolate(recurrent["pass1"], scale_factor=4, mode="bilinear")
    torch.testing.assert_close(plain["out"], expected)


def test_a_pass_widens_what_a_pixel_depends_on() -> None:
    widths = []
    for passes in (1, 2, 3):
        module = build(passes=passes).double()
        # Means for maxima, so that every pixel counts.
        for at in (2, 5):
            module.net[at] = torch.nn.AvgPool2d(2)
        image = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
        module(image)["out"][0, 0, 64, 64].backward()
        assert image.grad is not None
        columns = image.grad.abs().sum((0, 1, 2)).nonzero().flatten()
        widths.append(int(columns[-1] - columns[0] + 1))
    assert widths[0] < widths[1] < widths[2]
    # Each further pass adds as much again.
    assert widths[2] - widths[1] == widths[1] - widths[0]


def test_all_passes_are_trained() -> None:
    """The loss is the sum over the passes, and the gradient that of the sum."""
    module, image = build(), torch.randn(2, 3, 16, 24)
    target = torch.randint(4, (2, 16, 24))
    heads = {"pass1": 1.0, "pass2": 1.0, "out": 1.0}
    loss = SemanticLoss(SemanticLossOptions(heads=heads), num_classes=4, device=torch.device("cpu"))
    output = module(image)
    term = loss.terms(output, {"semantic": target})["cross_entropy"]

    def at_size(logits: Tensor) -> Tensor:
        return functional.interpolate(logits, size=(16, 24), mode="bilinear")

    expected = sum(functional.cross_entropy(at_size(output[name]), target) for name in heads)
    torch.testing.assert_close(term.total / term.weight, expected)
    with pytest.raises(ValueError, match=r"got pass1, pass2 as well"):
        SemanticLoss(SemanticLossOptions(), num_classes=4, device=torch.device("cpu")).terms(
            output, {"semantic": target}
        )


def test_every_parameter_learns() -> None:
    module = build().train()
    output = module(torch.randn(2, 3, 16, 16))
    functional.cross_entropy(output["out"], torch.randint(4, (2, 16, 16))).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    weight = module.net[0].get_parameter("weight")
    assert weight.grad is not None
    assert weight.grad[:, 3:].abs().sum() > 0


def test_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="kernel must be odd, got 8"):
        RecurrentCNN(4, kernel=8)
    with pytest.raises(
        ValueError, match="num_classes must be 2 or more, passes, width, kernel 1 or more, got 4, 0, 25, 7"
    ):
        RecurrentCNN(4, passes=0)
    with pytest.raises(ValueError, match="multiples of 4, got 18 x 16"):
        build()(torch.randn(1, 3, 18, 16))
