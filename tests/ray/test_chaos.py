"""The short form of chaos.py on the session's Ray: deaths while storage fails, and a driver that is told to go."""

from collections.abc import Iterator
from contextlib import ExitStack

import chaos
import psutil
import pytest
from local_cluster import outside_environment
from rounds import Place, kind_of

UNITS, KILLS = 12, 4


class SessionCluster:
    """The session's Ray, for rounds."""

    def __init__(self, address: str) -> None:
        self.environment = {**outside_environment(), "RAY_ADDRESS": address}

    def workers(self) -> list[tuple[str, psutil.Process]]:
        """Those of actors that label: idle ones are for other tests."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if kind_of(title) == "actor":
                found.append((title, process))
        return found


@pytest.fixture(scope="module")
def place(cluster: str) -> Iterator[Place]:
    session = SessionCluster(cluster)
    with ExitStack() as stack:
        yield chaos.prepare(stack, session, session.environment, seed=4, minutes=10, units=UNITS, kills=KILLS)


def test_kills_while_storage_fails_cost_no_row(place: Place) -> None:
    chaos.run(place, "storage and kills", 0)
    assert place.tally.kills["driver"]
    assert place.tally.kills["actor"]
    assert place.tally.kills.total() == KILLS
    assert place.tally.faults.total() > 10


def test_a_driver_that_is_told_to_go_commits_and_exits_130(place: Place) -> None:
    ends = place.tally.ends["130"]
    chaos.run(place, "sigterm", 1)
    assert place.tally.ends["130"] == ends + 1
