"""A cluster whose workers come when they are asked for: Ray's own autoscaler, with nodes that are processes here."""

from pathlib import Path

import pytest
from disturbed import Command
from job_helpers import rows_of
from local_cluster import LocalCluster

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

SCENES = ("source.format=scenes", "source.count=60", "source.unit_images=10", "source.width=64", "source.height=48")
# No more than the head has, so that workers must be on nodes that come.
WORKER = ("resources.workers=2", "resources.cpus_per_worker=2", "resources.torch_threads=1")
LABEL = ("models.0.name=unet_small", "models.0.weights=bundled:unet_small_scenes", "source.targets=[]")


@pytest.fixture(scope="module")
def cluster() -> LocalCluster:
    with LocalCluster(nodes=1, cpus=1, grows={"CPU": 2}) as running:
        yield running


def test_a_run_begins_on_the_first_node_that_comes(cluster: LocalCluster, tmp_path: Path) -> None:
    arguments = ["-m", "jobs.label", *SCENES, *LABEL, *WORKER, f"output.uri={tmp_path / 'labels'}"]
    refused = Command.start(arguments, tmp_path / "refused", cluster.environment)
    assert refused.end() == 2
    assert "no node can hold a worker of 2 CPU, 0 GPU" in refused.words
    waited = Command.start([*arguments, "resources.node_wait_s=240"], tmp_path / "waited", cluster.environment)
    assert waited.end() == 0, waited.words
    assert "waiting up to 240 s for a node that holds a worker of 2 CPU, 0 GPU" in waited.words
    assert [row["status"] for row in rows_of(tmp_path / "labels", ["image_id", "status"])] == ["ok"] * 60
