"""Sums of losses over heads, sizes that fit or not, options that make sense or not, and that models learn from them."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import get_model

from pipeline.errors import ConfigError
from pipeline.training.losses.lovasz import lovasz_softmax
from pipeline.training.losses.objective import DepthLoss, DepthLossOptions, SemanticLoss, SemanticLossOptions
from pipeline.training.losses.semantic import cross_entropy, dice, focal
from pipeline.training.losses.term import combine

CPU = torch.device("cpu")
CLASSES = 3


def build(**options: Any) -> SemanticLoss:
    return SemanticLoss(SemanticLossOptions(**options), num_classes=CLASSES, device=CPU)


def make_batch() -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    logits_BKHW = torch.randn(2, CLASSES, 8, 12, generator=generator)
    target_BHW = torch.randint(0, CLASSES, (2, 8, 12), generator=generator)
    target_BHW[:, :2] = 255
    return logits_BKHW, {"semantic": target_BHW.to(torch.uint8)}


def test_each_term_is_its_loss_and_the_sum_is_by_factors() -> None:
    logits_BKHW, batch = make_batch()
    loss = build(
        cross_entropy=0.5,
        focal=2.0,
        dice=1.5,
        lovasz=0.25,
        class_weights=(1.0, 2.0, 3.0),
        focal_gamma=1.0,
        focal_alpha=(0.2, 0.3, 0.4),
        per_image=False,
    )
    target_BHW = batch["semantic"]
    expected = {
        "cross_entropy": cross_entropy(logits_BKHW, target_BHW, class_weight_K=torch.tensor([1.0, 2.0, 3.0])),
        "focal": focal(logits_BKHW, target_BHW, gamma=1.0, alpha_K=torch.tensor([0.2, 0.3, 0.4])),
        "dice": dice(logits_BKHW, target_BHW, per_image=False),
        "lovasz": lovasz_softmax(logits_BKHW, target_BHW, per_image=False),
    }
    terms = loss.terms(logits_BKHW, batch)
    assert set(terms) == set(expected)
    for name, term in terms.items():
        torch.testing.assert_close(term.mean(), expected[name].mean())
    total = sum(factor * float(expected[name].mean()) for name, factor in loss.factors.items())
    assert float(combine(terms, loss.factors)) == pytest.approx(total)


def test_what_counts_for_nothing_is_not_computed() -> None:
    logits_BKHW, batch = make_batch()
    assert set(build(dice=1.0, cross_entropy=0.0).terms(logits_BKHW, batch)) == {"dice"}


def test_heads_are_added_by_what_they_count_for() -> None:
    logits_BKHW, batch = make_batch()
    aux_BKHW = logits_BKHW.roll(1, 1)
    out, aux = (cross_entropy(logits, batch["semantic"]).mean() for logits in (logits_BKHW, aux_BKHW))
    loss = build()
    heads = {"out": logits_BKHW, "aux": aux_BKHW}
    torch.testing.assert_close(combine(loss.terms(heads, batch), loss.factors), out + 0.5 * aux)
    torch.testing.assert_close(combine(loss.terms({"out": logits_BKHW}, batch), loss.factors), out)
    other = build(heads={"out": 1.0, "aux": 0.0})
    torch.testing.assert_close(combine(other.terms(heads, batch), other.factors), out)


def test_a_head_of_another_name_is_refused() -> None:
    logits_BKHW, batch = make_batch()
    with pytest.raises(ValueError, match=r"expected heads \['aux', 'out'\] \(heads\), got deep as well"):
        build().terms({"out": logits_BKHW, "deep": logits_BKHW}, batch)


def test_pixel_weights_reach_the_cross_entropy() -> None:
    logits_BKHW, batch = make_batch()
    weight_BHW = torch.rand(2, 8, 12, generator=torch.Generator().manual_seed(1))
    found = build(dice=1.0).terms(logits_BKHW, batch | {"pixel_weight": weight_BHW})
    expected = cross_entropy(logits_BKHW, batch["semantic"], pixel_weight_BHW=weight_BHW)
    torch.testing.assert_close(found["cross_entropy"].mean(), expected.mean())
    torch.testing.assert_close(found["dice"].mean(), dice(logits_BKHW, batch["semantic"]).mean())


def test_pixel_weights_hold_those_of_the_classes() -> None:
    """U-Net's w is w_c plus a term: a batch that brings it has its class weights counted once, in terms and weights."""
    logits_BKHW, batch = make_batch()
    weight_BHW = 1 + torch.rand(2, 8, 12, generator=torch.Generator().manual_seed(1))
    loss = build(class_weights=(5.0, 0.0, 7.0))
    term = loss.terms(logits_BKHW, batch | {"pixel_weight": weight_BHW})["cross_entropy"]
    nats_BHW = functional.cross_entropy(logits_BKHW, batch["semantic"].long(), ignore_index=255, reduction="none")
    torch.testing.assert_close(term.total, (nats_BHW * weight_BHW).sum())
    torch.testing.assert_close(term.weight, weight_BHW[:, 2:].sum())
    torch.testing.assert_close(loss.weights(batch | {"pixel_weight": weight_BHW})["cross_entropy"], term.weight)
    assert float(loss.weights(batch)["cross_entropy"]) != pytest.approx(float(term.weight))


def test_logits_at_a_whole_fraction_are_upsampled() -> None:
    _, batch = make_batch()
    small_BKHW = torch.randn(2, CLASSES, 2, 3, generator=torch.Generator().manual_seed(2))
    sized_BKHW = functional.interpolate(small_BKHW, size=(8, 12), mode="bilinear", align_corners=False)
    expected = cross_entropy(sized_BKHW, batch["semantic"]).mean()
    torch.testing.assert_close(build().terms(small_BKHW, batch)["cross_entropy"].mean(), expected)


@pytest.mark.parametrize("size", [(2, 6), (4, 3), (3, 5), (8, 11), (16, 24)])
def test_logits_of_any_other_size_are_refused(size: tuple[int, int]) -> None:
    """A factor of its own in each direction, no whole factor, or the valid part of a larger input."""
    _, batch = make_batch()
    with pytest.raises(ValueError, match=f"expected logits of 2 x K x 8 x 12, got 2 x 3 x {size[0]} x {size[1]}"):
        build().terms(torch.zeros(2, CLASSES, *size), batch)


def test_another_number_of_classes_is_refused() -> None:
    _, batch = make_batch()
    with pytest.raises(ValueError, match="expected 3 classes of head 'out', got 4"):
        build().terms(torch.zeros(2, 4, 8, 12), batch)


def test_classes_beyond_255() -> None:
    loss = SemanticLoss(SemanticLossOptions(dice=1.0), num_classes=300, device=CPU, void_id=65535)
    target_BHW = torch.tensor([[[0, 255, 299, 65535]]], dtype=torch.int32)
    logits_BKHW = torch.randn(1, 300, 1, 4, generator=torch.Generator().manual_seed(0))
    expected = functional.cross_entropy(logits_BKHW[..., :3], target_BHW[..., :3].long())
    torch.testing.assert_close(loss.terms(logits_BKHW, {"semantic": target_BHW})["cross_entropy"].mean(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_entropy": 0.0}, "one of them for more than 0"),
        ({"dice": -1.0}, "must count for 0 or more"),
        ({"focal_gamma": -0.1}, "focal_gamma must be 0 or more, got -0.1"),
        ({"class_weights": ()}, "class_weights must be 0 or more, one of them more than 0"),
        ({"class_weights": (0.0, 0.0)}, "class_weights must be 0 or more, one of them more than 0"),
        ({"focal_alpha": (1.0, -1.0)}, "focal_alpha must be 0 or more"),
        ({"heads": {"out": -1.0}}, "heads must count for 0 or more"),
        ({"heads": {}}, "heads must count for 0 or more"),
    ],
)
def test_semantic_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SemanticLossOptions(**options)


def test_class_weights_are_one_per_class() -> None:
    with pytest.raises(ConfigError, match="class_weights must have one value for each of 3 classes, got 2"):
        build(class_weights=(1.0, 2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "l3"}, "kind must be one of l1, l2, smooth_l1, log_l1, silog, scale_shift_invariant, got 'l3'"),
        ({"alignment": "median"}, "alignment must be one of least_squares, robust"),
        ({"min_depth": 0.0}, "expected 0 < min_depth < max_depth"),
        ({"max_depth": 1e-4}, "expected 0 < min_depth < max_depth"),
        ({"trim": 1.0}, "trim must be 0 or more and under 1"),
        ({"variance_focus": 1.5}, "variance_focus 0 to 1"),
        ({"beta": 0.0}, "beta must be over 0"),
        ({"gradient_scales": -1}, "gradient_scales and gradient_factor 0 or more"),
    ],
)
def test_depth_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DepthLossOptions(**options)


@pytest.mark.parametrize("options", [SemanticLossOptions(dice=1.0), DepthLossOptions(kind="silog")])
def test_options_travel_between_processes(options: Any) -> None:
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize("shape", ["B1HW", "BHW", "out", "half"])
def test_depth_outputs_of_every_shape(shape: str) -> None:
    target_BHW = torch.full((1, 4, 6), 2.0)
    pred_BHW = torch.full((1, 4, 6), 3.5)
    output: Any = {
        "B1HW": pred_BHW[:, None],
        "BHW": pred_BHW,
        "out": {"out": pred_BHW[:, None]},
        "half": pred_BHW[:, None, ::2, ::2],
    }[shape]
    term = DepthLoss(DepthLossOptions()).terms(output, {"depth": target_BHW})["l1"]
    assert float(term.mean()) == pytest.approx(1.5)


def test_inverse_depth_is_compared_in_its_own_space() -> None:
    target_BHW = torch.tensor([[[1.0, 2.0, 4.0, float("nan"), 0.0]]])
    batch = {"depth": target_BHW}
    loss = DepthLoss(DepthLossOptions(inverse=True))
    right_BHW = torch.tensor([[[1.0, 0.5, 0.25, 9.0, 9.0]]], requires_grad=True)
    term = loss.terms(right_BHW, batch)["l1"]
    assert (float(term.mean().detach()), float(term.weight)) == (0, 3)
    shifted = loss.terms(right_BHW + 0.5, batch)["l1"].mean()
    shifted.backward()
    assert float(shifted.detach()) == pytest.approx(0.5)
    assert right_BHW.grad is not None
    assert right_BHW.grad[0, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])


def test_torchvisions_auxiliary_head() -> None:
    torch.manual_seed(0)
    module = get_model(
        "deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True
    ).train()
    loss = build()
    batch = {"semantic": torch.randint(0, CLASSES, (2, 64, 64), generator=torch.Generator().manual_seed(0))}
    output = module(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert set(output) == {"out", "aux"}
    combine(loss.terms(output, batch), loss.factors).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def stripes() -> tuple[Tensor, Tensor]:
    """An image whose brightness says the class, with noise."""
    target_BHW = (torch.arange(24) // 8).repeat(2, 24, 1)
    noise = 0.2 * torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    return target_BHW[:, None].float() - 1 + noise, target_BHW


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "dice", "lovasz"])
def test_each_semantic_loss_teaches_a_model(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, CLASSES, 1))
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    image_BCHW, target_BHW = stripes()
    loss = build(**{"cross_entropy": 0.0, name: 1.0})
    for _ in range(50):
        optimizer.zero_grad()
        combine(loss.terms(module(image_BCHW), {"semantic": target_BHW}), loss.factors).backward()
        optimizer.step()
    assert float((module(image_BCHW).argmax(1) == target_BHW).float().mean()) > 0.9


@pytest.mark.parametrize("kind", ["l1", "l2", "smooth_l1", "silog", "scale_shift_invariant"])
def test_each_depth_loss_teaches_a_model(kind: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 1), nn.Softplus())
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    image_BCHW, index_BHW = stripes()
    target_BHW = 1 + 2 * index_BHW.float()
    loss = DepthLoss(DepthLossOptions(kind=kind, alignment="least_squares"))
    for _ in range(60):
        optimizer.zero_grad()
        combine(loss.terms(module(image_BCHW), {"depth": target_BHW}), loss.factors).backward()
        optimizer.step()
    pred_N, target_N = module(image_BCHW).detach().flatten(), target_BHW.flatten()
    correlation = torch.corrcoef(torch.stack([pred_N, target_N]))[0, 1]
    assert float(correlation.abs()) > 0.9
    if kind != "scale_shift_invariant":
        assert float(((pred_N - target_N).abs() / target_N).mean()) < 0.15
