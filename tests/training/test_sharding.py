"""A model that is cut among workers learns what a whole one does, and leaves the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sharding_helpers import Case, Ran, Run, Stepped, everything, go, take_steps
from torch import Tensor, nn
from torchvision.models import resnet18
from training_helpers import CPU, config, run_workers

from pipeline.errors import ConfigError
from pipeline.models.zoo.unet import UNetSmall
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.sharding import blueprint, full_copy, full_state, part_like, shard, shard_units
from pipeline.training.workers import Workers

BOTH = ("ddp", "fsdp")
SGD = {"kind": "sgd", "learning_rate": 0.1, "momentum": 0.9}
ADAMW = {"kind": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
# Those that any number of workers steps through as one, then those that only a run of as many workers is equal to.
EXACT = [
    (Case(optimizer=SGD, batches=(7, 1, 5, 4), accumulate=3, clip_norm=0.2, ema=0.8, thaw=2), BOTH),
    (Case(optimizer=ADAMW | {"backbone_factor": 0.5, "layer_decay": 0.7}, norm="synced"), ("fsdp",)),
]
ALIKE = [
    (Case(optimizer=ADAMW, batches=(7, 5), norm="local", precision="fp16", accumulate=2), BOTH),
    (Case(optimizer=SGD, batches=(7, 5), precision="bf16"), BOTH),
]
# Four steps to an epoch, two epochs.
SYNCED = {
    "batch_norm": "synced",
    "optimizer": {"kind": "sgd", "learning_rate": 0.05},
    "ema": 0.8,
    "clip_norm": 1.0,
    "freeze": {"stages": 1, "epochs": 1},
}
FROZEN = {"batch_norm": "frozen", "optimizer": {"weight_decay": 0.1}, "accumulate": 2}
FSDP = {"strategy": "fsdp"}
CLOCK = {"seconds", "images_per_s", "ended_at"}


def instances(strategy: str, folder: Path) -> Run:
    """Five images in batches of two, cut in two passes: some have no image."""

    def scenes(count: int) -> dict[str, Any]:
        return {"format": "scenes", "count": count, "width": 96, "height": 72, "targets": ["instances"]}

    given = config(
        folder / strategy,
        source=scenes(5),
        validation={"source": scenes(3)},
        model={"spec": "training_models:INSTANCES"},
        target={"taxonomy": "scenes"},
        augment={"crop": [64, 96]},
        batch_images=2,
        accumulate=2,
        epochs=1,
        strategy=strategy,
    )
    return Run(f"instances, {strategy}", given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def shared(folder: Path) -> dict[int, list[Any]]:
    """Everything that takes several workers, in one start of processes."""
    runs = [
        Run("whole", config(folder / "whole", **SYNCED, **FSDP)),
        Run("cut", config(folder / "cut", **SYNCED, **FSDP), stop=6, copy=str(folder / "other")),
        Run("resumed", config(folder / "cut", **SYNCED, **FSDP)),
        Run("ddp", config(folder / "switched", **FROZEN), stop=2),
        Run("fsdp", config(folder / "switched", **FROZEN, **FSDP)),
        *(instances(strategy, folder) for strategy in BOTH),
    ]
    return run_workers(everything, [2, 3], [*EXACT, *ALIKE], runs)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


def rows(ran: Ran) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in ran.rows]


@pytest.mark.parametrize("at", range(len(EXACT)))
def test_parts_step_as_the_whole(shared: dict[int, list[Any]], at: int) -> None:
    case, strategies = EXACT[at]
    expected = take_steps(Workers(), case, "ddp")
    for size, strategy in [(size, strategy) for size in (2, 3) for strategy in strategies]:
        for worker in shared[size]:
            found: Stepped = worker[at, strategy]
            assert_close(found.state, expected.state)
            for one, other in zip(expected.results, found.results, strict=True):
                assert other.loss == pytest.approx(one.loss, rel=1e-5)
                assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)


def test_the_cases_freeze_clip_and_average() -> None:
    case = EXACT[0][0]
    whole = take_steps(Workers(), case, "ddp")
    assert all(result.gradient_norm > 0.2 for result in whole.results[:2])
    still = take_steps(Workers(), Case(**{**vars(case), "batches": (7, 1)}), "ddp")
    name = "encoder.0.0.0.weight"
    start = take_steps(Workers(), Case(**{**vars(case), "batches": ()}), "ddp")
    assert torch.equal(still.state[name], start.state[name])
    assert float((whole.state[name] - start.state[name]).abs().max()) > 1e-3
    assert float((whole.state["head.weight"] - whole.state["ema.head.weight"]).abs().max()) > 1e-3


@pytest.mark.parametrize("at", range(len(EXACT), len(EXACT) + len(ALIKE)))
@pytest.mark.parametrize("size", [2, 3])
def test_parts_step_as_ddp(shared: dict[int, list[Any]], at: int, size: int) -> None:
    """Half precision, and local statistics: rank 0's are kept."""
    first = shared[size][0]
    assert_close(first[at, "fsdp"].state, first[at, "ddp"].state, tolerance=1e-4)


@pytest.mark.parametrize("size", [2, 3])
def test_each_worker_holds_its_part(shared: dict[int, list[Any]], size: int) -> None:
    held = [worker[1, "fsdp"] for worker in shared[size]]
    numbers = sum(parameter.numel() for parameter in UNetSmall(5, width=4, depth=2).parameters())
    assert sum(found.parameters for found in held) == numbers
    # AdamW has two averages of each. Channels of 4 and classes of 5 do not divide among 3.
    assert sum(found.averages for found in held) == 2 * numbers
    assert max(found.parameters for found in held) < 1.2 * numbers / size


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_are_exchanged_once_a_step(shared: dict[int, list[Any]], size: int) -> None:
    """However many passes it has: of five blocks and the root, two of the blocks frozen in half of the steps."""
    assert [worker[0, "fsdp"].exchanges for worker in shared[size]] == [2 * 4 + 2 * 6] * size


@pytest.mark.parametrize("size", [2, 3])
def test_what_overflows_in_one_part_overflows(shared: dict[int, list[Any]], size: int) -> None:
    assert [worker["overflow"] for worker in shared[size]] == [(torch.inf, False)] * size


def test_resumed_is_uninterrupted(shared: dict[int, list[Any]]) -> None:
    """Two workers, stopped in the second epoch: bit by bit."""
    for worker in shared[2]:
        whole, cut, resumed = (worker[name] for name in ("whole", "cut", "resumed"))
        assert len(cut.losses) == 6
        assert cut.losses + resumed.losses == whole.losses
        assert rows(cut) + rows(resumed) == rows(whole)
        assert whole.state.keys() == resumed.state.keys()
        for name, value in whole.state.items():
            assert torch.equal(resumed.state[name], value), name


def test_another_number_of_workers_or_strategy_goes_on(shared: dict[int, list[Any]], folder: Path) -> None:
    one = go(Workers(), Run("one", config(folder / "one", **SYNCED)))
    assert_close(shared[2][1]["whole"].state, one.state)
    other = go(Workers(), Run("other", config(folder / "other", **SYNCED)))
    assert len(other.losses) == 2
    assert_close(other.state, one.state)
    # Half as fsdp, half as ddp, without an average: AdamW.
    plain = go(Workers(), Run("plain", config(folder / "plain", **FROZEN)))
    assert (len(shared[2][0]["ddp"].losses), len(shared[2][0]["fsdp"].losses)) == (2, 6)
    for worker in shared[2]:
        assert_close(worker["fsdp"].state, plain.state)
        for row, expected in zip(rows(worker["fsdp"]), rows(plain), strict=True):
            assert row["mIoU"] == pytest.approx(expected["mIoU"], abs=1e-3)


def test_checkpoints_do_not_show_the_strategy(shared: dict[int, list[Any]], folder: Path) -> None:
    files = []
    for name in ("whole", "other"):
        newest = CheckpointStore(str(folder / name), {}).newest()
        assert newest is not None
        _, model, tensors, meta = newest
        shapes = {key: (value.shape, value.dtype) for key, value in (model | tensors).items()}
        files.append((shapes, meta["state"], meta.keys(), model))
    assert files[0][:3] == files[1][:3]
    assert_close(files[0][3], shared[2][0]["whole"].state, tolerance=0.0)


def test_instances_are_learned(shared: dict[int, list[Any]]) -> None:
    """A model whose heads see other numbers of proposals on each worker."""
    whole, parts = (shared[2][0][f"instances, {strategy}"] for strategy in BOTH)
    assert_close(parts.state, whole.state)
    assert rows(parts)[0].keys() == rows(whole)[0].keys()


def test_one_worker_has_the_whole(tmp_path: Path) -> None:
    states = []
    for strategy in BOTH:
        given = config(tmp_path / strategy, epochs=1, validation=None, strategy=strategy)
        states.append(go(Workers(), Run(strategy, given)).state)
    assert_close(*states, tolerance=0.0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.mix(values)
        return out


class Encoder(nn.Module):
    """Layers in a list of lists, plain layers, and a layer that shares its weight with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.layers = nn.ModuleList([nn.ModuleList([Layer(), Layer()]), nn.ModuleList([Layer()])])
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.tied = nn.ModuleList([Layer()])
        self.head = nn.Linear(4, 4)
        self.head.weight = self.tied[0].get_parameter("mix.weight")

    def forward(self, values: Tensor) -> Tensor:
        raise NotImplementedError


class Segmenter(nn.Module):
    """A backbone of a stage and a plain layer, a decoder of a block and one without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"deep": Encoder(), "flat": nn.Conv2d(3, 3, 1)})
        self.decoder = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Sequential(nn.ReLU())])


def names(module: nn.Module, backbone: str = "") -> list[str]:
    known = {child: name for name, child in module.named_modules()}
    return [known[unit] for unit in shard_units(module, backbone)]


def test_units_are_blocks_and_stages_inner_ones_first() -> None:
    blocks = ["layers.1.0", "layers.0.1", "layers.0.0"]
    assert names(Encoder()) == blocks
    # A stage that holds all places of the weight that is shared.
    assert names(Segmenter()) == ["decoder.0", *(f"backbone.deep.{name}" for name in blocks), "backbone.deep"]
    levels = [*(f"decoder.{level}" for level in (1, 0)), *(f"encoder.{level}" for level in (2, 1, 0))]
    assert names(UNetSmall(5, width=4, depth=2)) == levels
    resnet = resnet18()
    assert names(resnet) == []
    assert names(nn.ModuleDict({"backbone": resnet})) == [f"backbone.layer{stage}" for stage in (4, 3, 2, 1)]
    with pytest.raises(ConfigError, match="expected a backbone at 'body'"):
        shard_units(resnet, "body")


def test_what_is_not_cut_is_as_it_was() -> None:
    module = UNetSmall(5, width=4, depth=1)
    value = torch.arange(3.0)
    assert part_like(value, torch.zeros(3)) is value
    assert full_state({"a": value, "b": 2}, keep=True) == {"a": value, "b": 2}
    assert full_state({"a": value}, keep=False) == {}
    plan = blueprint(module.train())
    assert all(parameter.is_meta for parameter in plan.parameters())
    assert not any(parameter.is_meta for parameter in module.parameters())
    copied = full_copy(plan, module, CPU)
    assert not copied.training
    assert_close(dict(copied.state_dict()), dict(module.state_dict()), tolerance=0.0)


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    module = nn.Module()
    module.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match=r"strategy must be ddp .* got fsdp with 'scale'"):
        shard(module, [], Workers(), CPU)
    compiled = {"name": "unet_small", "options": {"compile": True}}
    with pytest.raises(ValueError, match=r"model\.options\.compile must be false where strategy is fsdp"):
        config(tmp_path, model=compiled, strategy="fsdp")
