"""Observing a real run: what limits it, what Prometheus reads from Ray, and what the log says."""

import json
import re
import time
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest
import ray
from job_helpers import jpeg, run_json, run_label, tar_bytes

from jobs import status
from pipeline.observe.metrics import METRICS

LABEL_METRICS = {name for name in METRICS if not name.startswith("maskmill_train_")}


def scraped(names: set[str], timeout_s: float = 60) -> dict[str, float]:
    """What the node's agent shows, once it shows all `names`: values by name and our own tags."""
    port = ray.nodes()[0]["MetricsExportPort"]
    address = f"http://{ray.util.get_node_ip_address()}:{port}/metrics"
    opener = build_opener(ProxyHandler({}))
    end = time.monotonic() + timeout_s
    while True:
        values = {}
        for line in opener.open(address, timeout=30).read().decode().splitlines():
            if match := re.match(r"ray_(maskmill_\w+)\{(.*)\} (\S+)$", line):
                tags = re.findall(r'\b(model|status|stage|queue)="([^"]*)"', match[2])
                values[" ".join([match[1], *(value for _, value in sorted(tags))])] = float(match[3])
        if names <= values.keys() or time.monotonic() > end:
            return values
        time.sleep(0.5)


def test_what_limits_a_run_and_what_is_said_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Scenes are drawn as they are read, which takes far longer than a model that does nothing.
    source = ("source.format=scenes", "source.count=24", "source.width=640", "source.height=480", "score=null")
    assert run_label(*source, "models.0.name=null_model", f"output.uri={tmp_path / 'reader'}") == 0
    stalls = run_json(tmp_path / "reader")["observed"]["accelerator"]
    assert stalls["bound"] == "reader", stalls
    assert "reader-bound: " in capsys.readouterr().err

    members = {f"{index}.jpg": jpeg(index, 64, 48) for index in range(12)} | {"bad.jpg": b"no image"}
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    slow = (
        "source.format=webdataset",
        f"source.uri={tmp_path / 'a.tar'}",
        "models.0.spec=observe_models:SLOW",
        "resources.batch_pixels=1",
        f"output.uri={tmp_path / 'slow'}",
        "failure_budget=1",
        "cost.per_node_hour=3600",
        f"log.path={tmp_path / 'run.jsonl'}",
    )
    assert run_label(*slow) == 0
    run = run_json(tmp_path / "slow")
    stalls, cost = run["observed"]["accelerator"], run["observed"]["cost"]
    assert stalls["bound"] == "accelerator", stalls
    # One node at one a second, since the cluster was joined.
    assert run["label_s"] < cost["so_far"]
    assert cost["per_1000_images"] == pytest.approx(cost["so_far"] / 13 * 1000)
    assert cost["to_go"] == 0
    said = capsys.readouterr().err
    assert "accelerator-bound: " in said
    assert f"cost: {cost['so_far']:.0f}"[:7] in said
    assert status.main([str(tmp_path / "slow")]) == 0
    assert "accelerator-bound: " in capsys.readouterr().out

    log = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert {line["run_id"] for line in log} == {run["run_id"]}
    assert [line["event"] for line in log if line["event"] != "commit"] == ["run_running", "failed_row", "run_done"]
    assert sum(line["rows"] for line in log if line["event"] == "commit") == 13
    (failed,) = (line for line in log if line["event"] == "failed_row")
    assert (failed["shard_id"], failed["image_id"], failed["error_type"]) == ("a.tar", "a.tar/bad", "CorruptImageError")

    # Ray hands figures on every few seconds, those of one run not all at once.
    committed = "maskmill_rows_committed_total"
    values = scraped({"maskmill_images_total slow failed", committed})
    assert {name.split()[0] for name in values} >= LABEL_METRICS
    assert values[committed] >= 13
    assert values["maskmill_images_total slow ok"] == 12
    assert values["maskmill_images_total slow failed"] == 1
    assert values["maskmill_stage_seconds_total predict"] >= 12 * 0.4
    assert values["maskmill_cost"] > 0
