"""`maskmill export` as tasks of a cluster: the same bytes as in threads."""

from pathlib import Path

import pytest
from export_helpers import files_of, run_export, scene_table


def test_pieces_on_the_cluster_are_those_of_threads(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene_table(tmp_path / "table", "instance")
    assert run_export(tmp_path / "table", "coco", tmp_path / "threads", "rows_per_piece=4") == 0
    # The session's Ray is joined already; the variable says that there is a cluster.
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    assert run_export(tmp_path / "table", "coco", tmp_path / "cluster", "rows_per_piece=4") == 0
    found = [
        {file: data for file, data in files_of(tmp_path / folder).items() if not file.startswith("_export/plan")}
        for folder in ("threads", "cluster")
    ]
    assert found[0] == found[1]
