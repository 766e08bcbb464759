"""Which table is meant, which rows count, and what became of each."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from report_helpers import SPACE, VERSION, describe, failed, row, semantic_score, write_run, write_table

from pipeline.errors import ConfigError, SchemaError, StorageError
from pipeline.report import rows as rows_module
from pipeline.report.rows import OUTCOMES, open_scored
from pipeline.rows import LATER, PREDICTIONS

REPOSITORY = Path(__file__).resolve().parents[2]
SCORE = semantic_score(1)
MISMATCH = {"error_type": "TargetMismatchError", "error_message": "sizes differ"}
# What is stored -> outcome, type, stage, message.
CASES: dict[str, tuple[dict[str, Any], tuple[str, str | None, str | None, str | None]]] = {
    "scored": (row("a/0", SCORE), ("ok", None, None, None)),
    "failed": (failed("a/0"), ("failed", "CorruptImageError", "decode", "bad a/0")),
    "no target": (
        row("a/0"),
        (
            "missing_target",
            "MissingTargetError",
            "match",
            "the source has no target of the prediction's kind for this image",
        ),
    ),
    "no fit": (row("a/0", MISMATCH), ("failed", "TargetMismatchError", "score", "sizes differ")),
    "stranger": (
        failed("a/0", "MissingTargetError", "match"),
        ("missing_target", "MissingTargetError", "match", "bad a/0"),
    ),
    "unpredicted": (
        failed("a/0", "MissingPredictionError", "match"),
        ("missing_prediction", "MissingPredictionError", "match", "bad a/0"),
    ),
    "no status": (row("a/0", SCORE, status=None), ("failed", "unknown", "", None)),
}


@pytest.mark.parametrize("job", ["label", "evaluate"])
@pytest.mark.parametrize("name", CASES)
def test_outcomes(name: str, job: str, tmp_path: Path) -> None:
    stored, expected = CASES[name]
    uri = write_table(tmp_path, [stored, row("b/1", SCORE)], job=job)
    blocks = pa.Table.from_batches(open_scored(uri, {})[0].blocks())
    found = {item["image_id"]: item for item in blocks.to_pylist()}
    columns = ("outcome", "error_type", "error_stage", "error_message")
    assert tuple(found["a/0"][column] for column in columns) == expected
    assert found["a/0"]["outcome"] in OUTCOMES
    assert found["b/1"]["outcome"] == "ok"
    assert found["b/1"]["score"]["classes"] == SCORE["classes"]


def test_blocks_join_small_files_and_leave_out_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [row(f"a/{n}", SCORE) for n in range(10)]
    old = [row(f"b/{n}", SCORE, model_version="v0") for n in range(3)]
    uri = write_table(tmp_path, [*mine, *old], models=["m", "other"], cuts=range(1, 13), job="evaluate")
    first, second = open_scored(uri, {})
    assert [one.model["label"] for one in (first, second)] == ["m", "other"]
    (block,) = first.blocks(["model", "run_id"])
    assert sorted(block["image_id"].to_pylist()) == [f"a/{n}" for n in range(10)]
    assert set(block["model"].to_pylist()) == {"m"}
    assert block["run_id"].to_pylist() == ["run"] * 10
    monkeypatch.setattr(rows_module, "BLOCK_ROWS", 4)
    assert [len(block) for block in first.blocks()] == [4, 4, 2]


def test_a_process_that_leaves_a_scan_early_ends_well(tmp_path: Path) -> None:
    """Arrow reads on in threads that call Python; they crashed or hung the interpreter's exit."""
    uri = write_table(tmp_path, [row(f"a/{n}", SCORE) for n in range(40)], cuts=range(1, 40))
    code = "from pipeline.table import RowTable; import sys; next(RowTable.open(sys.argv[1], {}).scan(['score']))"
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code, uri], check=True, timeout=60, cwd=REPOSITORY)


def test_the_scores_below_a_table_without_scores(tmp_path: Path) -> None:
    rows = [row("a/0"), row("a/1")]
    uri = write_table(tmp_path / "t", rows)
    with pytest.raises(ConfigError, match=r"no scores: .* `maskmill evaluate .* predictions.uri=.*/t` scores it"):
        open_scored(uri, {})
    scores = write_table(f"{uri}/_scores", [row("a/0", SCORE)], job="evaluate")
    for address in (uri, scores):
        (one,) = open_scored(address, {})
        assert (one.table.uri, one.run["job"]) == (scores, "evaluate")
    in_pass = write_table(tmp_path / "u", [row("a/0"), row("a/1", SCORE)])
    write_table(f"{in_pass}/_scores", [row("a/0", SCORE)], job="evaluate")
    assert open_scored(in_pass, {})[0].table.uri == in_pass


def test_a_table_that_is_older_than_scores(tmp_path: Path) -> None:
    uri = str(tmp_path)
    old = pa.schema([field for field in PREDICTIONS if field.name not in LATER])
    DeltaTable.create(uri, schema=old, partition_by=["model"])
    stored = [{"image_id": "a/0", "status": "ok", "model": "m", "model_version": VERSION}]
    write_deltalake(uri, pa.Table.from_pylist(stored, schema=old), mode="append")
    write_run(uri, job="label", models=[describe("m", SPACE)])
    with pytest.raises(ConfigError, match="no scores"):
        open_scored(uri, {})


def test_the_label_space_is_that_of_the_scores(tmp_path: Path) -> None:
    uri = write_table(tmp_path, [row("a/0", SCORE)])
    model = describe("m", SPACE)
    assert open_scored(uri, {})[0].taxonomy == SPACE
    own = {**SPACE.describe(), "name": "own"}
    write_run(uri, job="label", models=[{**model, "taxonomy": own}])
    assert open_scored(uri, {})[0].taxonomy.name == "test"
    write_run(uri, job="label", models=[{"label": "m", "version": VERSION, "taxonomy": own}])
    assert open_scored(uri, {})[0].taxonomy.name == "own"
    write_run(uri, job="label", models=[{"label": "m", "version": VERSION}])
    with pytest.raises(ConfigError, match="holds no taxonomy"):
        open_scored(uri, {})


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"run\.json does not exist"):
        open_scored(str(tmp_path / "none"), {})
    uri = write_table(tmp_path / "t", [row("a/0", SCORE)])
    with pytest.raises(ConfigError, match=r"no model 'n' in .*; there are m"):
        open_scored(uri, {}, "n")
    write_run(uri, job="evaluate", models=[describe("m", SPACE)])
    with pytest.raises(SchemaError, match="no score table"):
        open_scored(uri, {})
