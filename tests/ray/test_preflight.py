"""A preflight on the cluster that the run will use, and the run with what it proposed."""

from pathlib import Path

import pytest

from jobs import label, preflight
from pipeline.table import RowTable


def test_a_preflight_measures_on_the_cluster_and_its_proposal_runs(
    cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "label.yaml", tmp_path / "out"
    path.write_text(
        "source: {format: scenes, count: 12, unit_images: 4, width: 64, height: 48}\n"
        f"models: [{{name: unet_small}}]\nscore: null\nray_address: {cluster}\noutput: {{uri: {out}}}\n"
    )
    argv = [str(path), "--units", "2", "--images", "2", "--seconds", "2", "--apply"]
    code = preflight.main(argv)
    printed = capfd.readouterr().out
    assert code == 0, printed
    assert "proposal  for 1 node of 2 CPU" in printed
    assert not out.exists()
    assert label.main([str(tmp_path / "label.preflight.yaml")]) == 0
    assert RowTable.open(str(out), {}).counts("unet_small", _version(out)) == (12, 0)
    capfd.readouterr()
    # Again: the table is this config's own, and nothing is left to do.
    assert preflight.main(argv[:-1]) == 0
    printed = capfd.readouterr().out
    assert "done): unet_small 12 rows" in printed
    assert "0 images to do take 0 s" in printed


def _version(out: Path) -> str:
    (version,) = set(RowTable.open(str(out), {}).files().column("model_version").to_pylist())
    return str(version)
