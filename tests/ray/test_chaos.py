"""The short form of chaos.py on the session's Ray: deaths while storage fails, and a driver that is told to go."""

from collections.abc import Iterator
from contextlib import ExitStack

import chaos
import psutil
import pytest
from disturbed import weather
from local_cluster import outside_environment
from rounds import LabelRound, Place, kind_of

UNITS = 16
KILLS = ("actor", "driver", "actor")


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
        yield chaos.prepare(stack, session, session.environment, seed=4, minutes=10, units=UNITS)


def deaths(the: LabelRound) -> None:
    """Each of KILLS once in the middle of the work, while storage is unwell."""
    the.place.proxy.faults += weather(the.rng, 0.02)
    the.reasons.add("faults")
    command = the.start()
    for kind in KILLS:
        while not (the.wait_for_more(command, the.look()) and the.kill(kind, command)):
            if not command.running:
                assert not the.ended(command), "all was labelled before anything died"
                command = the.start()
        if not command.running:
            the.ended(command)
            command = the.start()
    the.finish(command)


def test_kills_while_storage_fails_cost_no_row(place: Place) -> None:
    chaos.run(place, "deaths", 0, deaths)
    assert place.tally.kills == {"actor": 2, "driver": 1}
    assert place.tally.faults.total() > 5


def test_a_driver_that_is_told_to_go_commits_and_exits_130(place: Place) -> None:
    ends = place.tally.ends["130"]
    chaos.run(place, "sigterm", 1, lambda the: chaos.sigterm(the, longest_pause_s=0.0))
    assert place.tally.ends["130"] == ends + 1
