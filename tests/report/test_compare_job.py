"""`maskmill compare` of scored runs: where it writes, what it prints, what it refuses; Ray is never asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
from compare_helpers import two_runs
from report_helpers import LABELLED, TASK_SPACE, depth_score, label_rows, row, semantic_score, write_table

from jobs.cli import main
from pipeline.config import ScoreConfig
from pipeline.dataflow import cluster


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(cluster, "connect", refuse)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    a, b = two_runs(1, 20)
    return write_table(tmp_path / "a", a, models=["old"]), write_table(tmp_path / "b", b, cuts=[5], models=["new"])


def run(*arguments: object) -> int:
    return main(["compare", *map(str, arguments), "--bootstrap", "30"])


def test_tables_and_files(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*runs) == 0
    out, error = capsys.readouterr()
    folder = Path(runs[1]) / "_compare"
    assert sorted(path.name for path in folder.iterdir()) == [
        "compare.json",
        "images.parquet",
        "index.html",
        "per_class.parquet",
        "problems.parquet",
    ]
    comparison = json.loads((folder / "compare.json").read_text())
    lines = out.splitlines()
    assert "A: old, run 20240506T070809-abcdef: done" in lines
    assert "B: new, run 20240506T070809-abcdef: done" in lines
    assert f"comparison: {folder}/compare.json" in lines
    assert f"page: {folder}/index.html" in lines
    (line,) = [line for line in lines if line.startswith("mIoU  ") and "to" in line]
    figure = comparison["figures"]["semantic.mIoU"]
    assert f"{100 * figure['a']:.1f} %" in line
    assert f"{100 * abs(figure['difference']):.2f} points" in line
    assert "unclear" in line or "better" in line or "worse" in line
    assert "ok only in A" in out
    assert "CorruptImageError" in out
    # This run.json does not say what the source was, so the page has no pictures.
    assert error.startswith("maskmill: the page has no pictures: ")


def test_json_alone(runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*runs, "--json", "--out", tmp_path / "elsewhere", "--no-page", "--images", 1) == 0
    out, error = capsys.readouterr()
    assert (tmp_path / "elsewhere" / "compare.json").read_text() == out
    comparison = json.loads(out)
    assert comparison["bootstrap"]["replicates"] == 30
    assert len(comparison["images"]["semantic.mIoU"]["improved"]) == 1
    assert error == ""
    assert not (tmp_path / "elsewhere" / "index.html").exists()
    assert not (Path(runs[1]) / "_compare").exists()


def test_two_models_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = write_table(tmp_path / "out", [row("a/0", semantic_score(1))], models=["m", "other"])
    assert run(uri, uri) == 2
    assert f"A, {uri}, has the models m, other; --models says which of A and of B" in capsys.readouterr().err
    assert run(uri, uri, "--models", "m", "other", "--json") == 0
    comparison = json.loads(capsys.readouterr().out)
    assert [comparison[side]["model"]["label"] for side in "ab"] == ["m", "other"]
    assert comparison["settings"] == [{"name": "model.label", "a": "m", "b": "other"}]
    assert run(uri, uri, "--models", "m", "absent") == 2
    assert "no model 'absent'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--bootstrap", "-1"], 2, "--bootstrap must be 0 or more, got -1"),
        (["--images", "-1"], 2, "--images must be 0 or more"),
        (["output.storage.key=x"], 2, "expected one of a, b, storage, source, score, workers, ray_address to be set"),
        (["a.stroage.key=x"], 2, "got 'a.stroage'"),
        (["a=1"], 2, "expected a.key=value, got a=1"),
        (["storage"], 2, "expected dotted.key=value"),
    ],
)
def test_what_is_refused(
    arguments: list[str], code: int, message: str, runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *runs, *arguments]) == code
    out, error = capsys.readouterr()
    assert message in error
    assert out == ""


def test_scores_of_different_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_table(tmp_path / "a", [row("s/1", semantic_score(1))])
    b = write_table(tmp_path / "b", [row("s/1", depth_score(1))])
    assert run(a, b) == 2
    assert "--agreement" in capsys.readouterr().err


def test_nothing_there(runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(runs[0], tmp_path / "none") == 4
    assert "run.json does not exist" in capsys.readouterr().err


def test_pictures_of_both_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B is A upside down: the image that was worst is right, and the reverse."""
    config = {"source": LABELLED.model_dump(mode="json"), "score": ScoreConfig().model_dump(mode="json")}
    rows = label_rows()
    whose = ("image_id", "shard_id", "position")
    turned = [{**other, **{key: own[key] for key in whose}} for own, other in zip(rows, rows[::-1], strict=True)]
    a = write_table(tmp_path / "a", rows, taxonomy=TASK_SPACE, config=config)
    b = write_table(tmp_path / "b", turned, taxonomy=TASK_SPACE, config=config, cuts=[4])
    assert run(a, b, "--images", 2) == 0
    error: Any = capsys.readouterr().err
    assert error == ""
    page = (tmp_path / "b" / "_compare" / "index.html").read_text()
    # Of two figures, two images at each end, all of them with six panels.
    assert page.count("data:image/webp") == 2 * 2 * 2 * 6
    for name in ("image", "target", "A", "B", "error of A", "error of B"):
        assert page.count(f'alt="{name} of scenes/') == 8
    assert run(a, b, "source.count=5", "--images", 2) == 0
    assert "not in the source any more" in (tmp_path / "b" / "_compare" / "index.html").read_text()
