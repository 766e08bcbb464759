"""One local Ray instance for all tests of the session: it takes seconds to start."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from train_helpers import run_train

from pipeline.dataflow.cluster import start_here

os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
# One process less for each training; nothing announces here that it takes a node away.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


@pytest.fixture(scope="session", autouse=True)
def ray_session() -> Iterator[None]:
    """The session's Ray; jobs started in this process join it."""
    os.environ.pop("RAY_ADDRESS", None)
    # Workers find the tests' own models here.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).strip(
        ":"
    )
    # Starting a process that imports torch is most of what a test costs: tasks find those of earlier tests.
    kept = {"num_workers_soft_limit": 8, "idle_worker_killing_time_threshold_ms": 3_600_000}
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    start_here(num_cpus=2, object_store_memory=500_000_000, _system_config=kept, **quiet)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def cluster() -> str:
    """The address of the session's Ray, for drivers that are processes of their own."""
    address: str = ray.get_runtime_context().gcs_address
    return address


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole training of one worker that nothing disturbed; workers know its path from the driver's folder."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_train(os.path.relpath(folder)) == 0
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several clusters share the cores of a machine that tests all: a hang is what takes twice as long as any other."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))
