"""Models of every task in one run. tests/models/test_every_model.py has them all, as a worker has them."""

import json
from pathlib import Path

from job_helpers import rows_of, run_label
from tiny_models import TINY

from pipeline.models.registry import MODELS

IMAGES = 3
# Of every family, the lightest.
NAMES = ("unet_small", "yolo_v1", "rfdetr_seg", "maskformer", "depth_anything_v2", "sam", "sppnet", "fastrcnn")


def test_each_family_labels_in_one_run(tmp_path: Path) -> None:
    names = sorted(NAMES)
    assert {MODELS[name].task for name in names} == {"semantic", "instance", "detection", "panoptic", "depth"}
    config = {
        "source": {"format": "scenes", "count": IMAGES, "width": 64, "height": 48},
        "models": [{"name": name, "label": name, "options": TINY[name]} for name in names],
        "output": {"uri": str(tmp_path / "table")},
        "resources": {"torch_threads": 1},
    }
    path = tmp_path / "families.yaml"
    path.write_text(json.dumps(config))  # which is YAML, and without the anchors of a list that stands twice
    assert run_label(str(path)) == 0
    columns = ["image_id", "model", "status", "error_message", "semantic", "segments", "depth"]
    rows = rows_of(tmp_path / "table", columns)
    assert [(row["model"], row["status"], row["error_message"]) for row in rows] == [
        (name, "ok", None) for name in names for _ in range(IMAGES)
    ]
    for row in rows:
        task = MODELS[row["model"]].task
        assert (row["semantic"] is not None) == (task in ("semantic", "panoptic")), row["model"]
        assert (row["segments"] is not None) == (task in ("instance", "detection", "panoptic")), row["model"]
        assert (row["depth"] is not None) == (task == "depth"), row["model"]
