"""One local Ray instance for all tests of the session: it takes seconds to start."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipeline.dataflow.cluster import start_here

os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@pytest.fixture(scope="session", autouse=True)
def ray_session() -> Iterator[None]:
    """The session's Ray; jobs started in this process join it."""
    os.environ.pop("RAY_ADDRESS", None)
    # Workers find the tests' own models here.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).strip(
        ":"
    )
    start_here(num_cpus=2, log_to_driver=False, object_store_memory=500_000_000, logging_level="ERROR")
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several clusters share the cores of a machine that tests all: a hang is what takes twice as long as any other."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))
