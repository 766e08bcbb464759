"""`maskmill evaluate` on Ray: its scores are those of the labelling's own pass."""

from pathlib import Path

import pytest
from job_helpers import rows_of, run_evaluate, run_label

UNET = ("models.0.name=unet_small", "models.0.weights=bundled:unet_small_scenes")
SCENES = ("source.format=scenes", "source.count=30", "source.unit_images=8", "source.width=96", "source.height=64")


@pytest.mark.long
def test_scores_in_pass_equal_scores_afterwards(tmp_path: Path) -> None:
    assert run_label(*SCENES, *UNET, "output.rows_per_file=5", f"output.uri={tmp_path}") == 0
    in_pass = rows_of(tmp_path, ["image_id", "model", "status", "score"])
    assert all(row["status"] == "ok" and row["score"]["confusion"] for row in in_pass)
    assert run_evaluate(*SCENES, f"predictions.uri={tmp_path}", "output.rows_per_file=7") == 0
    after = rows_of(tmp_path / "_scores")
    assert [(row["image_id"], row["score"]) for row in after] == [(row["image_id"], row["score"]) for row in in_pass]
