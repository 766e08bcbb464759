"""The short form of chaos.py on the session's Ray: deaths while storage fails, and a driver that is told to go."""

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import chaos
import psutil
from disturbed import weather
from job_helpers import run_label
from local_cluster import outside_environment
from rounds import LabelRound, kind_of

UNITS = 40


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


def label_here(arguments: list[str], log: Path) -> None:
    assert run_label(*arguments) == 0


def deaths(the: LabelRound) -> None:
    """While storage is unwell an actor dies, the driver is told to go, and the next driver dies."""
    the.place.proxy.faults += [fault for fault in weather(the.rng, 0.01) if fault.what != "stall"]
    the.reasons |= {"faults", "sigterm"}
    command = the.start()

    def in_the_middle(disturb: Callable[[], bool]) -> None:
        nonlocal command
        while not (the.wait_for_more(command, the.look()) and disturb()):
            if not command.running:
                assert not the.ended(command), "all was labelled before anything happened"
                command = the.start()

    def told_to_go() -> bool:
        command.process.send_signal(signal.SIGTERM)
        return command.end() == 130

    in_the_middle(lambda: the.kill("actor", command))
    in_the_middle(told_to_go)
    assert "interrupted; what is committed stays" in command.words
    the.ended(command)
    command = the.start()
    in_the_middle(lambda: the.kill("driver", command))
    the.ended(command)
    the.finish()


def test_deaths_and_faulty_storage_cost_no_row(cluster: str) -> None:
    with ExitStack() as stack:
        place = chaos.prepare(stack, SessionCluster(cluster), label_here, seed=4, minutes=10, units=UNITS)
        chaos.run(place, "deaths", 0, deaths)
        assert place.tally.kills == {"actor": 1, "driver": 1}
        assert place.tally.ends["130"] == 1
        assert place.tally.faults.total() > 3
