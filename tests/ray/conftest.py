"""One local Ray instance for all tests of the session: it takes seconds to start."""

import os
from collections.abc import Iterator

import pytest
import ray

os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@pytest.fixture(scope="session", autouse=True)
def ray_session() -> Iterator[None]:
    """The session's Ray; jobs started in this process join it."""
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=500_000_000,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
