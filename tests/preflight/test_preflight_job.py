"""`maskmill preflight` as a user calls it: what it prints, its exit codes, and the copy that it writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preflight_helpers import jpeg, shards
from source_helpers import tar_bytes

from jobs import preflight
from pipeline.config import LabelConfig
from pipeline.configfile import load_config
from pipeline.preflight.measure import measure

LABEL = """\
# a comment
source: {{format: scenes, count: 24, unit_images: 6, width: 64, height: 48}}
models:
  - name: unet_small
    weights: bundled:unet_small_scenes
output:
  uri: {out}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """main() with the measuring in this process; gives its exit code, what it printed, and what it said of errors."""
    monkeypatch.setattr(preflight, "_measure_here", measure)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(*argv: object, seconds: float = 20) -> tuple[int, str, str]:
        code = preflight.main([*map(str, argv), "--seconds", str(seconds)])
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def label_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "label.yaml"
    path.write_text(LABEL.format(out=tmp_path / "out"))
    return path


def test_a_run_that_is_fine(run: Run, label_yaml: Path, tmp_path: Path) -> None:
    code, out, err = run(
        label_yaml, "seed=3", "resources.batch_pixels=6144", "--units", "2", "--images", "4", "--apply"
    )
    assert code == 0, out
    for text in (
        "source    24 images in 4 units, ",
        "looked at 8 images of 2 units",
        "model     unet_small",
        "unet_small, 64x48 pixels, by batch budget:",
        "<- ",
        "images labelled in",
        "bytes a row: unet_small",
        "list, write, read and delete work",
        "proposal  for 1 node of",
        "24 images to do take",
        "no problem found",
    ):
        assert text in out
    copy = tmp_path / "label.preflight.yaml"
    assert f"maskmill label {copy}" in err
    config = load_config(LabelConfig, str(copy))
    assert config.seed == 3
    assert config.resources.workers == 1
    assert isinstance(config.resources.batch_pixels, int)
    assert copy.read_text().startswith("# a comment\n")
    # Nothing was written where the table will be.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["label.preflight.yaml", "label.yaml"]


def test_json_has_the_same_and_no_credentials(run: Run, label_yaml: Path) -> None:
    secret = "sOmE-sEcReT-vAlUe"
    code, out, err = run(
        label_yaml,
        "--json",
        "resources.batch_pixels=6144",
        f"models.0.storage.secret={secret}",
        "--units=2",
        "--images=3",
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["job"] == "label"
    assert report["findings"]["problems"] == []
    measured = report["measured"]
    assert measured["source"]["images"] == {"value": 24.0, "low": 24.0, "high": 24.0}
    assert measured["source"]["failed_share"]["value"] == 0.0
    assert measured["models"][0]["license"] == "Apache-2.0"
    assert measured["rehearsal"]["rows"] == measured["rehearsal"]["images"] > 0
    budgets = {point["budget_pixels"] for point in measured["trials"][0]["points"]}
    assert {measured["best_pixels"]} <= budgets
    assert report["proposal"]["values"]["batch_pixels"] == measured["best_pixels"]
    assert report["projection"]["rate"] > 0
    assert secret not in out + err


def test_every_problem_is_named_with_what_to_do(run: Run, tmp_path: Path) -> None:
    good = jpeg()
    source = shards(tmp_path / "shards", [[good, good[:99]] * 10 for _ in range(6)])
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    code, out, _ = run(
        "source.format=webdataset", f"source.uri={source.uri}", "models.0.name=unet_small",
        "models.0.weights=/no/such/folder/model.safetensors", f"output.uri={blocked}/out", "--nodes", "3",
    )  # fmt: skip
    assert code == 1
    places = [line.split()[1] for line in out.splitlines() if line.startswith("problem ")]
    assert {"failure_budget:", "models.0:", "output.uri:"} <= set(places)
    assert "expected at most 1.00% of the images to fail, got 50.00%" in out
    assert "60 x CorruptImageError (decode), for example s-00" in out
    assert out.count("          -> ") == len(places)
    assert f"{len(places)} problems" in out


def test_a_source_that_is_not_there_is_a_problem(run: Run, label_yaml: Path, tmp_path: Path) -> None:
    code, out, _ = run(label_yaml, f"source={{format: files, uri: {tmp_path}/nowhere}}")
    assert code == 1
    assert "problem   source: " in out
    assert "nowhere" in out
    assert "list, write, read and delete work" in out


def test_a_cut_shard_is_a_problem(run: Run, label_yaml: Path, tmp_path: Path) -> None:
    source = shards(tmp_path / "shards", [[jpeg()] * 12] * 2)
    (tmp_path / "shards" / "s-001.tar").write_bytes(tar_bytes([("0.jpg", jpeg())] * 12)[:4000])
    code, out, _ = run(label_yaml, f"source={{format: webdataset, uri: {source.uri}}}", "failure_budget=1", seconds=1)
    assert code == 1
    assert "problem   source: unit s-001.tar ends early" in out


def test_a_train_config_has_its_source_model_and_output_checked(run: Run, tmp_path: Path) -> None:
    train: list[Any] = [
        "model.name=unet_small", "epochs=1", f"output.uri={tmp_path}/model", "source.format=scenes", "source.count=20",
        "source.width=64", "source.height=48",
    ]  # fmt: skip
    code, out, _ = run(*train, "--units=2")
    assert code == 0, out
    assert "20 images in 1 units" in out
    assert "model     unet_small" in out
    assert "proposal" not in out
    code, out, _ = run(*train, "source.targets=[]", "model.weights=/no/such.safetensors")
    assert code == 1
    assert "expected a target for at least 99.00% of the images, got 0.00%" in out
    assert "problem   model: " in out
    code, _, err = run(*train, "--apply", tmp_path / "copy.yaml")
    assert code == 2
    assert "expected a label config" in err


def test_where_time_is_up_early_the_configs_own_budget_stays(run: Run, label_yaml: Path) -> None:
    code, out, _ = run(label_yaml, "--units=1", "--images=2", seconds=0.001)
    assert code == 0, out
    assert "(ended by time)" in out
    assert "time was up before the config's batch budget was tried" in out
    assert "resources.batch_pixels" not in out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["/no/such/config.yaml"], "/no/such/config.yaml does not exist"),
        (["source.format=scenes", "models.0.name=unet_smal", "output.uri=out"], "unet_small"),
        (["source.format=scenes", "models.0.name=unet_small"], "output: field required"),
        (["source.format=scenes", "models.0.name=unet_small", "output.uri=o", "--apply"], "--apply needs a PATH"),
        (["source.format=scenes", "models.0.name=unet_small", "output.uri=o", "seeds=1"], "unknown key 'seeds'"),
    ],
)
def test_a_bad_config_is_2(run: Run, argv: list[str], text: str) -> None:
    code, out, err = run(*argv)
    assert code == 2
    assert out == ""
    assert text in err


def test_bad_arguments_are_2(capfd: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["a.yaml", "b.yaml"], ["a.yaml", "--units", "0"]):
        with pytest.raises(SystemExit) as left:
            preflight.main(argv)
        assert left.value.code == 2
    assert "expected a whole number above 0, got '0'" in capfd.readouterr().err
