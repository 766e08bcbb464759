"""The config of a training run: what it refuses, and that every field is documented."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from test_config import every_field

from pipeline.config_train import TrainConfig
from pipeline.configfile import describe, load_config
from pipeline.errors import ConfigError

BASE = """
source: {format: scenes, count: 100}
validation: {source: {format: scenes, start: 5000, count: 10}}
model: {name: unet_small}
epochs: 2
output: {uri: runs/a}
"""


def load(text: str, folder: Path, *overrides: str) -> TrainConfig:
    path = folder / "train.yaml"
    path.write_text(text)
    return load_config(TrainConfig, str(path), overrides)


def test_a_short_config_is_enough(tmp_path: Path) -> None:
    config = load(BASE, tmp_path, "optimizer.learning_rate=0.01", "validation.source.count=7", "augment.crop=[48, 64]")
    assert config.optimizer.learning_rate == 0.01
    assert config.validation is not None
    assert config.validation.source.format == "scenes"
    assert config.validation.source.count == 7
    assert config.augment.crop == (48, 64)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optimiser.kind=sgd", "unknown key 'optimiser' in the config; did you mean optimizer?"),
        ("optimizer.learnin_rate=1", "unknown key 'learnin_rate' in optimizer; did you mean learning_rate?"),
        ("validation.source.cuont=1", "unknown key 'cuont' in validation.source; did you mean count?"),
        ("validation.source.count=0", "validation.source.count: input should be greater than or equal to 1, got 0"),
        ("loss.semantic.dise=1", "unknown key 'dise' in loss.semantic; did you mean dice?"),
        ("epochs=0", "epochs: input should be greater than or equal to 1, got 0"),
        ("ema=1", "ema: input should be less than 1, got 1"),
        ("accumulate=17", "accumulate must be at most batch_images, got 17 and 16"),
        ("validation=null", "checkpoint.best needs a validation section"),
        ("freeze.epochs=1", "freeze.epochs needs freeze.stages of 1 or more"),
        ("precision=fp8", "precision: input should be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ("augment.crop=[0, 5]", "augment.crop.0: input should be greater than or equal to 1, got 0"),
    ],
)
def test_what_is_wrong_is_said(override: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(BASE, tmp_path, override, *(["checkpoint.best=mIoU"] if override == "validation=null" else []))
    assert part in str(caught.value)


def test_every_field_is_described() -> None:
    rows = describe(TrainConfig)
    assert {name for name, _, _ in rows} == every_field(TrainConfig)
    assert not [name for name, default, meaning in rows if not meaning.strip() or not default]
    assert len({(name, meaning) for name, _, meaning in rows}) == len(rows)
    assert {("output.uri", "required"), ("epochs", "required"), ("validation.source.format", "required")} <= {
        (name, default) for name, default, _ in rows
    }


def test_it_is_frozen(tmp_path: Path) -> None:
    config = load(BASE, tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        config.optimizer.kind = "sgd"  # type: ignore[misc]
