"""A step of several workers is the step of one worker with the whole batch."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from training_helpers import CPU, PREPROCESS, examples, run_workers, train_cases, train_steps, unet_spec

from pipeline.models.zoo.unet import UNetSmall
from pipeline.training.batch import blank_batch, collate
from pipeline.training.border import BorderWeights
from pipeline.training.losses.objective import SemanticLoss, SemanticLossOptions
from pipeline.training.norms import SyncedBatchNorm, blank_pass, sync_norms
from pipeline.training.optim import OptimizerOptions, build_optimizer
from pipeline.training.step import Stepper, Trainee
from pipeline.training.workers import Workers

LOSSES: dict[str, Any] = {"cross_entropy": 1.0, "dice": 0.5, "class_weights": (1.0, 2.0, 0.5, 1.0, 3.0)}
BORDER = BorderWeights(
    classes=frozenset({1, 3}), class_weights=LOSSES["class_weights"], void_id=255, w0=20.0, sigma=2.0
)
# (batch sizes, batch normalisation, micro-batches, losses, clip_norm, border); a batch of 1 leaves shares empty.
CASES: list[tuple[list[int], str, int, dict[str, Any], float | None, BorderWeights | None]] = [
    ([7, 1, 5], "frozen", 1, LOSSES, None, None),
    ([7, 2, 5], "frozen", 3, {"cross_entropy": 1.0, "lovasz": 1.0}, 0.5, None),
    ([7, 1, 5], "synced", 1, LOSSES, 0.5, None),
    ([7, 1, 5], "frozen", 2, LOSSES, None, BORDER),
]


@pytest.fixture(scope="module")
def shared() -> dict[int, list[Any]]:
    return run_workers(train_cases, [2, 3], CASES)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("at", range(len(CASES)))
def test_workers_step_as_one(shared: dict[int, list[Any]], at: int, size: int) -> None:
    torch.set_num_threads(1)
    expected, results = train_steps(Workers(), *CASES[at])
    for rank in range(size):
        state, found = shared[size][rank][at]
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5, msg=f"{name} of rank {rank}")
        for step, (one, other) in enumerate(zip(results, found, strict=True)):
            assert other.loss == pytest.approx(one.loss, rel=1e-5)
            assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)
            assert other.images == one.images == CASES[at][0][step]
            assert other.failed == sum(range(size))
            assert other.stop == (step == 1)


def test_the_cases_move_the_weights() -> None:
    """One image more or less of 7 makes a hundred times the difference that is allowed above."""
    one, _ = train_steps(Workers(), *CASES[0])
    other, _ = train_steps(Workers(), [6, 1, 5], *CASES[0][1:])
    assert max(float((one[name] - other[name]).abs().max()) for name in one) > 1e-3


def test_the_border_moves_the_weights() -> None:
    """Far more than workers may differ; what it weighs up is a share of the batch's sum and of its divisor."""
    one, plain = train_steps(Workers(), *CASES[3][:5])
    other, found = train_steps(Workers(), *CASES[3])
    assert max(float((one[name] - other[name]).abs().max()) for name in one) > 1e-3
    assert found[0].loss != pytest.approx(plain[0].loss, rel=1e-3)


def test_accumulation_changes_nothing() -> None:
    expected, _ = train_steps(Workers(), [7, 5], "frozen", 1, LOSSES, None)
    for parts in (2, 7):
        found, _ = train_steps(Workers(), [7, 5], "frozen", parts, LOSSES, None)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_workers_synced_norm_is_torchs(kind: Any, momentum: float | None) -> None:
    torch.manual_seed(0)
    shape = (6, 4) if kind is nn.BatchNorm1d else (6, 4, 5, 3)
    local = nn.Sequential(kind(4, momentum=momentum)).double()
    nn.init.normal_(local[0].weight)
    synced = copy.deepcopy(local)
    sync_norms(synced, Workers())
    assert isinstance(synced[0], SyncedBatchNorm)
    assert [*synced.state_dict()] == [*local.state_dict()]
    for _ in range(2):
        values = torch.randn(shape, dtype=torch.float64) * 3 + 2
        inputs = [values.clone().requires_grad_() for _ in range(2)]
        outputs = [module(item) for module, item in zip((local, synced), inputs, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
        for output in outputs:
            (output * torch.linspace(-1, 2, output.numel()).view(shape)).sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
    for name, value in local.state_dict().items():
        torch.testing.assert_close(synced.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    local.eval()
    synced.eval()
    torch.testing.assert_close(synced(values), local(values))


@pytest.mark.parametrize("synced", [True, False])
def test_a_blank_pass_leaves_no_trace(synced: bool) -> None:
    module = UNetSmall(5, width=4, depth=2).train()
    if synced:
        sync_norms(module, Workers())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with blank_pass(module):
        output = module(torch.randn(1, 3, 8, 8))
    assert torch.isfinite(output).all()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(child.training for child in module.modules())


def stepper(module: nn.Module, **options: Any) -> Stepper:
    optimizer = build_optimizer(module, OptimizerOptions(learning_rate=0.01))
    objective = SemanticLoss(SemanticLossOptions(), num_classes=5, device=CPU)
    trainee = Trainee(module, unet_spec())
    return Stepper(trainee, objective, optimizer, PREPROCESS, workers=Workers(), device=CPU, **options)


def test_a_batch_without_evidence_has_no_gradient() -> None:
    module = UNetSmall(5, width=4, depth=2).train()
    result = stepper(module).gradients([blank_batch(("semantic",), PREPROCESS, void_id=255)], failed=4)
    assert (result.loss, result.gradient_norm, result.images, result.failed) == (0.0, 0.0, 0, 4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(precision: str) -> None:
    torch.manual_seed(0)
    module = UNetSmall(5, width=4, depth=2).train()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if precision == "fp16" else None
    steps = stepper(module, precision=precision, scaler=scaler, clip_norm=1.0)
    batch = [collate(examples(4), PREPROCESS, void_id=255)]
    losses = []
    for _ in range(30):
        losses.append(steps.gradients(batch).loss)
        steps.update(0.01)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert losses[-1] < 0.97 * losses[0]


def test_what_is_not_finite_is_said() -> None:
    module = UNetSmall(5, width=4, depth=2).train()
    with torch.no_grad():
        module.head.bias[0] = math.nan
    result = stepper(module).gradients([collate(examples(2), PREPROCESS, void_id=255)])
    assert not result.finite(scaled=False)
    assert not result.finite(scaled=True)


def test_padding_is_neither_seen_nor_learned_from() -> None:
    small = examples(2, seed=5)
    large = {name: value[..., :21, :30] for name, value in small[0].items()}
    batch = collate([large, small[1]], PREPROCESS, void_id=255)
    assert batch.image_BCHW.shape == (2, 3, 24, 32)
    values = batch.normalised(PREPROCESS, torch.contiguous_format)
    assert (values[0, :, 21:] == 0).all()
    assert (values[0, :, :, 30:] == 0).all()
    assert (batch.targets["semantic"][0, 21:] == 255).all()
    expected = (small[1]["image"].float() / 255 - torch.tensor(PREPROCESS.mean).view(3, 1, 1)) / torch.tensor(
        PREPROCESS.std
    ).view(3, 1, 1)
    torch.testing.assert_close(values[1], expected.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6)
