"""Starting Ray on a busy machine, without starting it."""

from typing import Any

import pytest

from pipeline.dataflow import cluster
from pipeline.errors import ConfigError

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `ray.init` does, call by call: an error to raise, or None."""
    answers: list[Any] = []

    def init(**options: Any) -> None:
        answer = answers.pop(0)
        if answer:
            raise answer

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return answers


def test_a_node_that_is_slow_to_start_is_started_again(starts: list[Any]) -> None:
    starts += [Exception(SLOW), Exception(SLOW), None]
    cluster.connect(None)
    assert starts == []


def test_a_node_that_never_starts_is_said(starts: list[Any]) -> None:
    starts += [Exception(SLOW)] * cluster.LOCAL_STARTS
    with pytest.raises(ConfigError, match="cannot join the Ray cluster at this machine: The current node timed out"):
        cluster.connect(None)
    assert starts == []


def test_other_problems_are_said_at_once(starts: list[Any]) -> None:
    starts += [ValueError("no such option"), None]
    with pytest.raises(ConfigError, match="no such option"):
        cluster.connect(None)
    assert len(starts) == 1
