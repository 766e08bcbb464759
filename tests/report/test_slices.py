"""A slice's figures are those of a report of its rows alone; columns and fields that are not there are refused."""

from pathlib import Path
from typing import Any

import pytest
from report_helpers import mixed_rows, row, semantic_score, write_table

from pipeline.errors import ConfigError
from pipeline.report import slices as slices_module
from pipeline.report.report import ReportOptions, write_report
from pipeline.report.rows import open_scored
from pipeline.report.slices import check_columns
from pipeline.report.states import headline

SECTIONS = ("semantic", "boundary", "panoptic", "boundary_panoptic", "detection", "depth")


def report_of(folder: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    uri = write_table(folder, rows, cuts=range(5, len(rows), 5), job="evaluate")
    return write_report(open_scored(uri, {})[0], f"{uri}/_report", {}, ReportOptions(replicates=0, **options))


def field(stored: dict[str, Any], name: str) -> str:
    return dict(stored.get("fields") or ()).get(name, "(none)")


@pytest.mark.parametrize("by", ["city", "night", "shard", "width", "status"])
def test_slices_equal_reports_of_parts(by: str, tmp_path: Path) -> None:
    rows = mixed_rows(2, 40)
    whole = report_of(tmp_path / "whole", rows, by=[by])
    if by in ("city", "night"):
        values = [field(stored, by) for stored in rows]
    else:
        values = [str(stored["shard_id" if by == "shard" else by] or "(none)") for stored in rows]
    assert whole["slices"]["by"] == by
    found = {part["value"]: part for part in whole["slices"]["values"]}
    assert list(found) == sorted(set(values))
    for number, value in enumerate(found):
        own = [stored for stored, other in zip(rows, values, strict=True) if other == value]
        expected = report_of(tmp_path / str(number), own)
        assert found[value].pop("counts") == expected["counts"]
        assert found[value].pop("value") == value
        assert found[value] == headline({name: expected[name] for name in SECTIONS if name in expected})


def test_several_columns_are_several_slicings(tmp_path: Path) -> None:
    rows = mixed_rows(2, 12)
    both = report_of(tmp_path / "both", rows, by=["city", "shard"])["slices"]
    alone = [report_of(tmp_path / by, rows, by=[by])["slices"] for by in ("city", "shard")]
    assert both == alone


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    fields = [[("city", "a")], None, [("camera", "left")]]
    rows = [row(f"a/{n}", semantic_score(n), fields=own) for n, own in enumerate(fields)]
    scored = open_scored(write_table(tmp_path, rows, cuts=[1, 2]), {})[0]
    check_columns(scored, ["city", "camera", "shard", "shard_id", "model_version"])
    with pytest.raises(ConfigError, match=r"no column and no field 'citty'; did you mean city\?"):
        check_columns(scored, ["camera", "citty"])
    with pytest.raises(ConfigError, match=r"'xyz'; there are attempts, camera, city, .*, shard, shard_id, "):
        check_columns(scored, ["xyz"])
    with pytest.raises(ConfigError, match="no field 'score'"):
        check_columns(scored, ["score"])
    with pytest.raises(ConfigError, match="each column once"):
        check_columns(scored, ["city", "city"])


def test_too_many_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(f"a/{n}", semantic_score(n)) for n in range(4)]
    monkeypatch.setattr(slices_module, "MAX_VALUES", 4)
    assert len(report_of(tmp_path / "four", rows, by=["position"])["slices"]["values"]) == 4
    monkeypatch.setattr(slices_module, "MAX_VALUES", 3)
    with pytest.raises(ConfigError, match="--by position has more than 3 values, such as '3'"):
        report_of(tmp_path / "three", rows, by=["position"])
