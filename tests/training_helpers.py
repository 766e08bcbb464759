"""Several workers on this machine, small models and small data for tests of training."""

import itertools
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.config_train import TargetConfig, TrainConfig, ValidationConfig
from pipeline.models.load import load_model
from pipeline.models.registry import find_model
from pipeline.models.spec import ModelSpec, Preprocess
from pipeline.models.zoo.unet import UNetSmall
from pipeline.sources.registry import open_source
from pipeline.training.augment import Example, make_example
from pipeline.training.backbone import train_mode
from pipeline.training.batch import blank_batch, collate
from pipeline.training.border import BorderWeights
from pipeline.training.cells import label_cells
from pipeline.training.events import EpochDone, Event, Saved, StepDone
from pipeline.training.loop import TrainingLoop
from pipeline.training.losses.objective import SemanticLoss, SemanticLossOptions
from pipeline.training.norms import sync_norms
from pipeline.training.optim import OptimizerOptions, build_optimizer
from pipeline.training.order import part_range
from pipeline.training.plan import plan_source
from pipeline.training.step import Stepper, StepResult, Trainee, wrap
from pipeline.training.validate import Validator
from pipeline.training.workers import Workers

CPU = torch.device("cpu")
PREPROCESS = Preprocess(pad_multiple=4)
CLASSES = 5


def run_workers(function: Callable[..., Any], sizes: Sequence[int], *args: Any) -> dict[int, list[Any]]:
    """`function(workers, *args)` on groups of each size, by size and rank; one start of processes for all."""
    # They are forked from a server that has imported this once: with torch that is most of what such a test costs.
    multiprocessing.set_forkserver_preload(["pipeline.training.loop", "pipeline.training.validate"])
    with tempfile.TemporaryDirectory() as folder:
        given = (max(sizes), folder, function, tuple(sizes), args)
        mp.start_processes(_worker, given, nprocs=max(sizes), start_method="forkserver")
        return {
            size: [torch.load(Path(folder) / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)]
            for size in sizes
        }


def _worker(
    rank: int, count: int, folder: str, function: Callable[..., Any], sizes: Sequence[int], args: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    try:
        for size in sizes:
            group = dist.new_group(list(range(size)))
            if rank < size:
                result = function(Workers(rank=rank, size=size, group=group), *args)
                torch.save(result, Path(folder) / f"{size}-{rank}.pt")
            dist.barrier()
    finally:
        dist.destroy_process_group()


def examples(count: int, seed: int = 0) -> list[Example]:
    """Images of 32x24 whose targets have void, from none of it to all."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for index in range(count):
        image_HWC = torch.randint(0, 256, (24, 32, 3), generator=generator, dtype=torch.uint8)
        target_HW = torch.randint(0, CLASSES, (24, 32), generator=generator, dtype=torch.uint8)
        target_HW[: (index * 7) % 25] = 255
        result.append(make_example(image_HWC.numpy(), semantic_HW=target_HW.numpy()))
    return result


def train_steps(
    workers: Workers,
    batches: Sequence[int],
    norm: str,
    accumulate: int,
    loss: dict[str, Any],
    clip_norm: float | None,
    border: BorderWeights | None = None,
) -> tuple[dict[str, Tensor], list[StepResult]]:
    """SGD with momentum on batches of those sizes, shared among workers; the state afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module: nn.Module = UNetSmall(CLASSES, width=4, depth=2)
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    if norm == "synced":
        sync_norms(module, workers)
    train_mode(module, frozen_norms=norm == "frozen")
    optimizer = build_optimizer(module, OptimizerOptions(kind="sgd", learning_rate=0.1, momentum=0.9))
    objective = SemanticLoss(SemanticLossOptions(**loss), num_classes=CLASSES, device=CPU)
    spec = unet_spec()
    stepper = Stepper(
        wrap(Trainee(module, spec), workers, CPU),
        objective,
        optimizer,
        PREPROCESS,
        workers=workers,
        device=CPU,
        clip_norm=clip_norm,
    )
    results = []
    for step, size in enumerate(batches):
        members = examples(size, seed=step)
        if border is not None:
            cells = [label_cells(item["semantic"].numpy(), border.classes) for item in members]
            members = [
                border.weighted({**item, "panoptic": torch.from_numpy(cell_HW)})
                for item, cell_HW in zip(members, cells, strict=True)
            ]
        own = [members[at] for at in part_range(size, workers.rank, workers.size)]
        parts = [[own[at] for at in part_range(len(own), part, accumulate)] for part in range(accumulate)]
        results.append(
            stepper.gradients(
                [
                    collate(part, PREPROCESS, void_id=255)
                    if part
                    else blank_batch(("semantic",), PREPROCESS, void_id=255)
                    for part in parts
                ],
                failed=workers.rank,
                stop=workers.rank == 1 and step == 1,
            )
        )
        stepper.update(0.3)
    return {name: value.clone() for name, value in module.state_dict().items()}, results


def train_cases(workers: Workers, cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [train_steps(workers, *case) for case in cases]


def unet_spec() -> ModelSpec:
    return find_model("unet_small")


def config(folder: Path | str, **changes: Any) -> TrainConfig:
    """A run of seconds: scenes of 64x48, a U-Net of width 4."""
    scenes = {"format": "scenes", "width": 64, "height": 48, "targets": ["semantic"]}
    tree: dict[str, Any] = {
        "source": {**scenes, "count": 22, "unit_images": 5},
        "validation": {
            "source": {**scenes, "start": 1000, "count": 7, "unit_images": 3},
            "batch_images": 2,
            "sheet_images": 2,
        },
        "model": {"name": "unet_small", "options": {"width": 4, "depth": 2}},
        "epochs": 2,
        "batch_images": 6,
        "shuffle_images": 8,
        "augment": {"crop": [32, 32], "scale": [0.8, 1.3], "brightness": 0.2},
        "output": {"uri": str(folder)},
        "resources": {"decode_threads": 2},
    }
    return TrainConfig.model_validate(tree | changes)


def run_loop(given: TrainConfig, workers: Workers | None = None, **arguments: Any) -> tuple[TrainingLoop, list[Event]]:
    """A whole run, or one that `should_stop` ends."""
    loop = TrainingLoop(given, workers=workers or Workers(), device=CPU)
    loop.restore()
    return loop, list(loop.run(**arguments))


def validate_once(workers: Workers, tree: dict[str, Any], target: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """The bundled model's figures and merged state on a validation set."""
    model = load_model(ModelConfig(weights="bundled:unet_small_scenes"), seed=0, tile_pixels=2**22)
    given = ValidationConfig.model_validate(tree)
    validator = Validator(
        given,
        TargetConfig.model_validate(target or {}),
        plan_source(open_source(given.source)),
        model,
        device=CPU,
        threads=2,
    )
    scores = validator.score(model.module, workers)
    return scores.figures("semantic", model.taxonomy), scores.to_row()


def train_and_stop(workers: Workers, given: TrainConfig) -> tuple[Any, int, list[Any], int]:
    """Two workers stop in their fifth step, which only the last of them is asked to; others go on to the end."""
    calls = itertools.count(1)
    asked = workers.size == 2 and workers.rank == 1
    loop, events = run_loop(given, workers, should_stop=lambda: asked and next(calls) == 5)
    steps = sum(isinstance(event, StepDone) for event in events)
    rows = [dict(event.row) for event in events if isinstance(event, EpochDone)]
    saved = sum(isinstance(event, Saved) for event in events)
    return {name: value.clone() for name, value in loop.module.state_dict().items()}, steps, rows, saved
