"""`maskmill report`: where it writes, what it prints, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_helpers import mixed_rows, row, semantic_score, write_table

from jobs.cli import main


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_table(tmp_path / "out", mixed_rows(1, 12), cuts=[5])
    return tmp_path / "out"


def run(*arguments: object) -> int:
    return main(["report", *map(str, arguments), "--bootstrap", "30"])


def test_tables_and_files(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(table, "--by", "city", "--images", 2) == 0
    out, error = capsys.readouterr()
    report = json.loads((table / "_report" / "report.json").read_text())
    assert "m v1, run 20240506T070809-abcdef: done" in out
    assert "mIoU" in out
    assert "aachen" in out
    assert f"report: {table}/_report/report.json" in out.splitlines()
    assert f"page: {table}/_report/index.html" in out.splitlines()
    assert (table / "_report" / "index.html").read_text().lower().startswith("<!doctype html>")
    assert len(report["worst"]["semantic.mIoU"]) == 2
    # This run.json does not say what the source was, so the page has no pictures.
    assert error.startswith("maskmill: the page has no pictures: ")


def test_json_alone(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(table, "--json", "--out", tmp_path / "elsewhere", "--no-page") == 0
    out, error = capsys.readouterr()
    assert (tmp_path / "elsewhere" / "report.json").read_text() == out
    assert json.loads(out)["bootstrap"]["replicates"] == 30
    assert error == ""
    assert not (tmp_path / "elsewhere" / "index.html").exists()
    assert not (table / "_report").exists()


def test_several_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = write_table(tmp_path / "out", [row("a/0", semantic_score(1))], models=["m", "other.1"])
    assert run(uri, "--json", "--no-page") == 0
    reports = json.loads(capsys.readouterr().out)["models"]
    assert list(reports) == ["m", "other.1"]
    for label, report in reports.items():
        assert json.loads((tmp_path / "out" / "_report" / label / "report.json").read_text()) == report
        assert report["model"]["label"] == label
    assert run(uri, "--model", "m", "--json", "--no-page", "--out", tmp_path / "one") == 0
    assert json.loads(capsys.readouterr().out) == reports["m"]
    assert (tmp_path / "one" / "report.json").exists()
    assert run(uri, "--no-page") == 0
    assert capsys.readouterr().out.count("mIoU (present)") == 2


def test_a_label_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("a/0", semantic_score(1))]
    uri = write_table(tmp_path / "out", rows, models=["m", ".."])
    assert run(uri, "--no-page") == 2
    assert "'..' is no name of a folder; give --model and --out" in capsys.readouterr().err
    assert run(uri, "--no-page", "--model", "..", "--out", tmp_path / "x") == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--bootstrap", "-1"], 2, "--bootstrap must be 0 or more, got -1"),
        (["--images", "-1"], 2, "--images must be 0 or more"),
        (["--by", "citi"], 2, "did you mean city?"),
        (["--model", "n"], 2, "no model 'n'"),
        (["output.storage.key=x"], 2, "expected storage.key=value, source.key=value or predictions.key=value"),
        (["storage"], 2, "expected dotted.key=value"),
    ],
)
def test_what_is_refused(
    arguments: list[str], code: int, message: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(table), *arguments]) == code
    out, error = capsys.readouterr()
    assert message in error
    assert out == ""


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none") == 4
    assert "run.json does not exist" in capsys.readouterr().err
    rows: list[Any] = [row("a/0")]
    assert run(write_table(tmp_path / "unscored", rows)) == 2
    assert "maskmill evaluate" in capsys.readouterr().err
