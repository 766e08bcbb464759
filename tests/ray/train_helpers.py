"""What the tests of `maskmill train` on Ray share: one small run that nothing disturbs, and its figures."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs import train

IMAGES, BATCH, EPOCHS = 24, 6, 3
STEPS = EPOCHS * IMAGES // BATCH
SIZE = ("source.width=64", "source.height=48")
SCENES = (
    "source.format=scenes",
    f"source.count={IMAGES}",
    "source.unit_images=10",
    *SIZE,
    "validation.source.format=scenes",
    "validation.source.count=7",
    "validation.source.seed=9",
    *(f"validation.{part}" for part in SIZE),
)
# The statistics are those of whole batches, whatever the workers' shares, and no step forgets the one before.
LEARNING = (
    "model.name=unet_small",
    f"batch_images={BATCH}",
    f"epochs={EPOCHS}",
    "batch_norm=synced",
    "augment.flip=0.5",
    "optimizer.kind=sgd",
    "optimizer.learning_rate=0.004",
    "resources.torch_threads=1",
    "resources.cpus_per_worker=0.5",
)
CLOCK = ("seconds", "images_per_s", "ended_at")


def run_train(output: Path | str, *arguments: str) -> int:
    """`maskmill train` in this process; the exit code."""
    return train.main([*SCENES, *LEARNING, f"output.uri={output}", *arguments])


def history(output: Path) -> list[dict[str, Any]]:
    """What is the same for every run of the same seed: not how long it took."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def weights(output: Path) -> dict[str, Tensor]:
    """The published model."""
    return load_file(output / "checkpoint" / "model.safetensors")


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
