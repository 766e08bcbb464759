"""A table that is there already: gone on with, somebody else's, at work; and never touched."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from table_helpers import put

from pipeline.config import LabelConfig
from pipeline.preflight.existing import Existing, check_existing
from pipeline.preflight.finding import Findings
from pipeline.rows import SCORES
from pipeline.runfile import write_run
from pipeline.sources.base import Unit
from pipeline.table import RowTable
from pipeline.units import UnitLog, plan_table

MODELS: tuple[Mapping[str, Any], ...] = ({"label": "m", "version": "v1"},)


def plan(*names: str, fingerprint: str = "f") -> pa.Table:
    return plan_table(
        Unit(shard_id=name, location="", size_bytes=10, fingerprint=fingerprint, rows=5) for name in names
    )


def config(folder: Path, **more: Any) -> LabelConfig:
    tree = {"source": {"format": "scenes"}, "models": [{"name": "unet_small"}], "output": {"uri": str(folder)}}
    return LabelConfig.model_validate({**tree, **more})


def table(folder: Path, *, state: str = "done", models: tuple[Mapping[str, Any], ...] = MODELS) -> None:
    """A labelling run's output: units a and b, of which a has its five rows."""
    uri = str(folder)
    rows = RowTable.open(uri, {}, create=True)
    log = UnitLog(uri, {})
    log.create(rows.take_over())
    log.append_plan(plan("a", "b"), "run-1")
    rows.commit([put(uri, "a", range(5))])
    log.append_finished([("a", "v1", 5, None)], "run-1")
    write_run(uri, {}, {"run_id": "run-1", "state": state, "job": "label", "models": list(models)})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(
    folder: Path,
    units: pa.Table | None,
    models: tuple[Mapping[str, Any], ...] = MODELS,
    *,
    age_s: float = 0,
    **more: Any,
) -> tuple[Findings, Existing | None]:
    """`check_existing`, seen to change nothing."""
    before = files(folder)
    result = check_existing(config(folder, **more), units, models, now=datetime.now(UTC) + timedelta(seconds=age_s))
    assert files(folder) == before
    return result


def test_nothing_there_is_fine(tmp_path: Path) -> None:
    found, existing = check(tmp_path, plan("a"))
    assert (found.problems, found.notes, existing) == ([], [], None)


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    table(tmp_path)
    found, existing = check(tmp_path, plan("a", "b"))
    assert (found.problems, found.notes) == ([], [])
    assert existing == Existing(run_id="run-1", state="done", done={"m": 5})


def test_a_table_of_another_source_is_a_problem(tmp_path: Path) -> None:
    table(tmp_path)
    found, _ = check(tmp_path, plan("x", "y", "z"))
    (problem,) = found.problems
    assert "none of its 2 units (for example a) is among the 3 of source.uri" in problem.what
    part, _ = check(tmp_path, plan("b", "c"))
    assert part.problems == []
    assert part.notes == ["1 of the table's 2 units are not in the source any more"]


@pytest.mark.parametrize("on_changed", ["stop", "relabel"])
def test_labelled_units_that_changed_stop_the_run_or_are_relabelled(tmp_path: Path, on_changed: str) -> None:
    table(tmp_path)
    found, _ = check(tmp_path, plan("a", "b", fingerprint="other"), on_changed=on_changed)
    said = [item.what for item in found.problems] + found.notes
    assert len(said) == 1
    assert said[0].startswith("1 units changed after they were labelled, for example a")
    assert bool(found.problems) == (on_changed == "stop")


def test_a_run_at_work_is_a_problem_and_a_dead_one_is_not(tmp_path: Path) -> None:
    table(tmp_path, state="running")
    found, _ = check(tmp_path, plan("a", "b"))
    (problem,) = found.problems
    assert problem.what.startswith("run run-1 seems to be at work there")
    found, existing = check(tmp_path, plan("a", "b"), age_s=3600)
    assert found.problems == []
    assert "run-1 did not end in order" in found.notes[0]
    assert existing is not None


def test_other_models_and_versions_are_said(tmp_path: Path) -> None:
    table(tmp_path, models=(*MODELS, {"label": "old", "version": "v7"}))
    found, existing = check(tmp_path, plan("a", "b"), ({"label": "m", "version": "v2"},))
    assert found.problems == []
    assert "version v1 in the last run there and is v2 now" in found.notes[0]
    assert found.notes[1].endswith("which stay: old")
    assert existing is not None
    assert existing.done == {"m": 0}


def test_a_table_of_another_kind_is_a_problem(tmp_path: Path) -> None:
    RowTable.open(str(tmp_path), {}, create=True, schema=SCORES)
    found, existing = check(tmp_path, plan("a"))
    assert existing is None
    assert ["no prediction table" in item.what for item in found.problems] == [True]


def test_a_table_without_its_run_is_a_problem(tmp_path: Path) -> None:
    table(tmp_path)
    (tmp_path / "run.json").unlink()
    found, _ = check(tmp_path, plan("a"))
    assert "run.json does not exist" in found.problems[0].what


def test_a_source_that_could_not_be_planned_leaves_the_rest(tmp_path: Path) -> None:
    table(tmp_path)
    found, existing = check(tmp_path, None)
    assert found.problems == []
    assert existing is not None
