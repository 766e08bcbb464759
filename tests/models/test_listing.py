"""`maskmill models`: the table says what the registry is, and docs/models.md is that table."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import jobs.models
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models import listing
from pipeline.models.licences import licence, licence_warning
from pipeline.models.registry import MODELS

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "models.md"


def cells(text: str) -> list[list[str]]:
    """The rows of the table of models in a page, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = lines[: next((at for at, line in enumerate(lines) if line.startswith("| address")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_page_has_every_model_as_the_registry_has_it() -> None:
    """All but parameters and times, which follow the machine. `maskmill models --markdown --time` writes it."""
    written = {row[0].strip("`"): row for row in cells(PAGE.read_text("utf-8"))}
    assert list(written) == list(MODELS)
    for name, spec in MODELS.items():
        expected = [f"`{name}`", spec.task, spec.taxonomy, ", ".join(f"`{one}`" for one in ("none", *spec.weights))]
        assert written[name][:3] + written[name][4:5] == expected
        assert written[name][5].startswith(spec.license)
        assert ("non-commercial" in written[name][5]) == (not spec.commercial)
        assert written[name][6:8] == [spec.extra, spec.paper]
        assert re.fullmatch(r"–|\d+\.\d", written[name][8])


def test_parameters_are_counted_without_memory() -> None:
    """By hand for U-Net small's head and in all; what meta tensors cannot build is built."""
    assert listing.parameters(MODELS["unet_small"]) == sum(
        parameter.numel() for parameter in MODELS["unet_small"].build(8).parameters()
    )
    assert listing.parameters(MODELS["null_model"]) == 0
    seen = []

    def build(num_classes: int) -> nn.Module:
        layer = nn.Linear(10, num_classes)
        seen.append(layer.weight.device.type)
        layer.weight[0, 0].item()
        return layer

    assert listing.parameters(replace(MODELS["unet_small"], build=build)) == 88
    assert seen == ["meta", "cpu"]


def test_a_row_without_its_extra() -> None:
    def build(num_classes: int) -> nn.Module:
        raise ConfigError("it needs an extra")

    (row,) = listing.listed([replace(MODELS["unet_small"], build=build, extra="x", commercial=False)], timed=True)
    assert (row.parameters_m, row.seconds, row.extra) == (None, None, "x")
    assert listing.as_text(row)["M parameters"] == "–"
    assert listing.as_text(row)["licence"] == "Apache-2.0 (non-commercial)"


def test_the_extra_is_the_one_that_the_model_asks_for() -> None:
    """A module of models says in EXTRA which one its builders import."""
    for spec in MODELS.values():
        assert spec.extra == getattr(sys.modules[spec.build.__module__], "EXTRA", ""), spec.name


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.models.main(["unet_small", "null_model", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], second["name"]) == ("unet_small", "null_model")
    assert first["weights"] == ["none", "bundled:unet_small_scenes"]
    assert first["parameters_m"] == pytest.approx(listing.parameters(MODELS["unet_small"]) / 1e6)
    assert first["seconds"] is None


def test_as_markdown_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert jobs.models.main(["null_model", "unet_small", "--markdown", "--time"]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "| time |" in out
    assert "|--:|" in out
    null, small = cells(out)
    assert len(null) == len(small) == 9
    assert float(small[-1]) == 1 > float(null[-1]) >= 0


def test_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.models.main(["unet_small"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["name", "task", "taxonomy"]
    assert "none, bundled:unet_small_scenes" in row
    assert jobs.models.main(["unet-small"]) == 2
    assert "did you mean unet_small" in capsys.readouterr().err
    assert jobs.models.main(["--help"]) == 0
    assert jobs.models.main(["--nope"]) == 2


# --- licences


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("none", ("MIT", True)),
        ("hf:depth-anything/Depth-Anything-V2-Small-hf", ("MIT", True)),
        ("hf:depth-anything/Depth-Anything-V2-Large-hf@abc", ("MIT, weights CC-BY-NC-4.0", False)),
        ("hf:apple/DepthPro-hf:model.safetensors", ("MIT, weights Apple's licence for research", False)),
        (f"hf:nvidia/mit-b0#sha256={'0' * 64}", ("MIT, weights NVIDIA Source Code License (non-commercial)", False)),
        ("/data/nvidia/mit-b0/model.safetensors", ("MIT", True)),
        ("timm:resnet18.a1_in1k", ("MIT, weights apache-2.0", True)),
        ("timm:convnextv2_atto.fcmae@abc", ("MIT, weights cc-by-nc-4.0", False)),
    ],
)
def test_licences_of_weights(weights: str, expected: tuple[str, bool]) -> None:
    if weights.startswith("timm:"):
        pytest.importorskip("timm")
    assert licence(MODELS["unet"], weights) == expected


def test_a_licence_of_the_model_itself() -> None:
    text, commercial = licence(MODELS["segformer"], "none")
    assert (text, commercial) == ("NVIDIA Source Code License (non-commercial)", False)
    assert licence_warning("mine", text) == f"warning: the licence of mine ({text}) forbids commercial use"
    assert not licence(MODELS["segformer"], "hf:some/other")[1]


def test_a_checkpoint_keeps_the_licence_of_what_it_began_with() -> None:
    stored = {"license": "MIT, weights CC-BY-NC-4.0", "commercial": False}
    assert licence(MODELS["unet"], "s3://mine/checkpoint", stored) == ("MIT, weights CC-BY-NC-4.0", False)
    assert licence(MODELS["unet"], "s3://mine/checkpoint", {"license": "MIT", "commercial": True}) == ("MIT", True)


def test_licences_of_weights_that_timm_does_not_have() -> None:
    pytest.importorskip("timm")
    with pytest.raises(CheckpointError, match="timm has no weights"):
        licence(MODELS["unet"], "timm:resnet18.nope")
