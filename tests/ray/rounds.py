"""Rounds of disturbances: one job from its first start to its end, through whatever happens to it in between."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
from deltalake import DeltaTable
from disturbed import (
    HANG_S,
    ChaosError,
    Command,
    difference,
    digests,
    labelling,
    learning,
    rows_now,
    steps_now,
    unlike,
)
from fault_proxy import FaultProxy
from local_cluster import LocalCluster, LocalNode

TICK_S = 0.1
KILLED = -signal.SIGKILL
# Workers that do the job's own work.
ACTORS = ("ray::MapWorker", "ray::RayTrainWorker")
# Not the run's: a raylet ends with its agents, which is what kills of nodes are for.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
TAKEN_OVER = "another run has taken over"


@dataclass
class Tally:
    """What a program of rounds did."""

    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    rows: int = 0
    starts: int = 0

    def __str__(self) -> str:
        def listed(counts: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"

        return (
            f"{self.rounds} rounds, {self.starts} starts, {self.rows} rows\n"
            f"  kills  {self.kills.total():5}  ({listed(self.kills)})\n"
            f"  faults {self.faults.total():5}  ({listed(self.faults)})\n"
            f"  events {self.events.total():5}  ({listed(self.events)})\n"
            f"  ends   {self.ends.total():5}  ({listed(self.ends)})"
        )


class Cluster(Protocol):
    """What a round needs of one. environment: of a process that joins it."""

    environment: dict[str, str]

    def workers(self) -> list[tuple[str, psutil.Process]]:
        """(title, process) of every actor and task worker."""
        ...


@dataclass
class Place:
    """Where rounds happen.

    shards, storage: the corpus, and how jobs reach it through `proxy`; `direct` is how deltalake reaches the server
    itself. folder: of logs and local outputs. expected: each row of the run that nothing disturbed, as a digest.
    deadline: by the monotonic clock; what runs then is finished in peace. kills: of one round.
    """

    seed: int
    cluster: Cluster
    proxy: FaultProxy
    shards: str
    tables: str
    storage: dict[str, Any]
    direct: dict[str, str]
    folder: Path
    expected: dict[tuple[str, str], str]
    deadline: float
    kills: int = 12
    tally: Tally = field(default_factory=Tally)

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def say(self, line: str) -> None:
        print(line, flush=True)

    @property
    def nodes(self) -> LocalCluster:
        """The cluster, where it is one whose nodes may go."""
        assert isinstance(self.cluster, LocalCluster)
        return self.cluster

    def forget_faults(self) -> None:
        """Storage is well again; what it did is counted."""
        for fault in self.proxy.faults:
            name = str(fault.status) if fault.what == "status" else fault.what
            self.tally.faults[f"{name}, answer lost" if fault.forwarded else name] += fault.happened
        self.proxy.faults.clear()


class Round:
    """One job from its first start to its end. What `amount` counts grows while it works.

    rng: of this round alone. reasons: what has happened that may end a run. launcher: what Python runs. variables: of
    the commands' environment, beside the cluster's.
    """

    job: str
    kinds: tuple[str, ...] = ("actor", "actor", "worker", "driver")

    def __init__(self, place: Place, number: int) -> None:
        self.place = place
        self.rng = random.Random(f"{place.seed}:{number}")
        self.number = number
        self.reasons: set[str] = set()
        self.launcher = ["-m", f"jobs.{self.job}"]
        self.variables: dict[str, str] = {}
        self.commands: list[Command] = []
        self.stack = ExitStack()
        self._last = -1
        self._progress = time.monotonic()

    def arguments(self) -> list[str]:
        """Of the command, the same for each start."""
        raise NotImplementedError

    def amount(self) -> int:
        """How far it is."""
        raise NotImplementedError

    def check(self) -> int:
        """Rows, or steps. Raises ChaosError where the result is not that of the undisturbed run."""
        raise NotImplementedError

    def start(self) -> Command:
        """The command again, the same."""
        log = self.place.folder / f"round{self.number}-{len(self.commands)}.log"
        environment = {**self.place.cluster.environment, **self.variables}
        self.commands.append(Command.start([*self.launcher, *self.arguments()], log, environment))
        self.place.tally.starts += 1
        self.progress()
        return self.commands[-1]

    def progress(self) -> None:
        """Something happened: no hang so far."""
        self._progress = time.monotonic()

    def look(self) -> int:
        """`amount` now. Raises ChaosError where it has not changed for too long."""
        now = self.amount()
        if now != self._last:
            self._last = now
            self.progress()
        if time.monotonic() - self._progress > HANG_S:
            raise ChaosError(f"hangs at {now} for {HANG_S:g} s: {self.commands[-1].words[-2000:]}")
        return now

    def wait_for_more(self, command: Command, than: int) -> bool:
        """Until it is further; whether the run goes on."""
        while command.running:
            if self.look() > than:
                return True
            time.sleep(TICK_S)
        return False

    def pause(self, command: Command, longest_s: float) -> None:
        """Some moment, at most so long."""
        until = time.monotonic() + self.rng.uniform(0.0, longest_s)
        while command.running and time.monotonic() < until:
            time.sleep(TICK_S / 2)

    def finish(self, command: Command | None = None) -> None:
        """Let it run to its end, starting again where it had a reason to stop."""
        command = command or self.start()
        while True:
            while command.running:
                self.look()
                time.sleep(TICK_S)
            if self.ended(command):
                return
            command = self.start()

    def ended(self, command: Command) -> bool:
        """Whether all is done. Raises ChaosError where a run stopped without a reason."""
        code, words = command.end(), command.words
        self.place.tally.ends[str(code)] += 1
        if code == 0:
            return True
        line = next((line for line in words.splitlines()[::-1] if "maskmill: error" in line), words[-200:].strip())
        self.place.say(f"    run ended with {code}: {line[:240]}")
        reasons = {
            KILLED: {"driver"},
            130: {"sigterm"},
            4: {"faults", "head", "second driver", "refused", "worker", "disk"},
        }.get(code, {"head"})
        if not (reasons & self.reasons):
            raise ChaosError(f"a run ended with {code} after {sorted(self.reasons)}: {words[-3000:]}")
        if TAKEN_OVER in words and not {"second driver", "faults"} & self.reasons:
            raise ChaosError(f"a run was taken over by nobody: {words[-3000:]}")
        return False

    def clear(self) -> None:
        """End what is left of it."""
        for command in self.commands:
            command.clear()
        self.stack.close()

    # -- kills

    def kill(self, kind: str, command: Command) -> bool:
        """One kill -9; False where there is nothing of this kind now."""
        if kind == "driver":
            command.process.kill()
            command.process.wait()
        elif kind == "head":
            self.place.nodes.nodes[0].service(self.rng.choice(["raylet", "gcs_server"])).kill()
        elif kind == "node":
            if len(self.place.nodes.nodes) < 2:
                return False
            self.lose(self.rng.choice(self.place.nodes.nodes[1:]), lambda node: node.service("raylet").kill())
        else:
            found = [process for title, process in self.place.cluster.workers() if kind_of(title) == kind]
            if not found:
                return False
            try:
                self.rng.choice(found).kill()
            except psutil.NoSuchProcess:
                return False
        self.reasons.add(kind)
        self.place.tally.kills[kind] += 1
        self.progress()
        return True

    def lose(self, node: LocalNode, end: Callable[[LocalNode], None]) -> None:
        """A node goes, and after a moment another one comes."""
        self.place.nodes.nodes.remove(node)
        end(node)
        node.wait()
        self.progress()
        self.place.nodes.add()
        self.progress()

    def kill_often(self, kinds: tuple[str, ...], times: int) -> None:
        """Kills at random moments of the run, sometimes of several at once, then the rest in peace."""
        command = self.start()
        while times and not self.place.late:
            before = self.look()
            # Sometimes while it starts up or recovers, mostly in the middle of the work.
            if self.rng.random() < 0.6:
                self.wait_for_more(command, before)
            self.pause(command, 2.0)
            kind = self.rng.choice(kinds)
            for _ in range(self.rng.choice([1, 1, 2, 3]) if kind in ("actor", "worker") else 1):
                if command.running and times and self.kill(kind, command):
                    times -= 1
            if kind == "head" and "head" in self.reasons:
                self.head_died(command)
            if not command.running:
                if self.ended(command):
                    return
                command = self.start()
        self.finish(command)

    def head_died(self, command: Command) -> None:
        """The driver must end by itself; then there is a new cluster."""
        command.end()
        self.place.nodes.stop()
        self.place.nodes.start()
        self.progress()


class LabelRound(Round):
    """One table. uri, storage, direct: it, how the job reaches it, and how deltalake does."""

    job = "label"

    def __init__(self, place: Place, number: int) -> None:
        super().__init__(place, number)
        self.uri = f"{place.tables}-{number}"
        self.storage: dict[str, Any] = place.storage
        self.direct: dict[str, str] = place.direct

    def arguments(self) -> list[str]:
        return labelling(self.place.shards, self.uri, self.place.storage, self.storage)

    def amount(self) -> int:
        return rows_now(self.uri, self.direct)

    def check(self) -> int:
        found = digests(DeltaTable(self.uri, storage_options=self.direct))
        wrong = difference(self.place.expected, found)
        if wrong:
            raise ChaosError(wrong)
        return len(found)


class TrainRound(Round):
    """One training with a worker on each node."""

    job = "train"
    kinds = ("actor", "actor", "driver")

    def __init__(self, place: Place, number: int) -> None:
        super().__init__(place, number)
        self.workers = len(place.nodes.nodes)

    @property
    def output(self) -> Path:
        return self.place.folder / f"trained-{self.number}"

    def arguments(self) -> list[str]:
        return learning(self.output, self.workers)

    def amount(self) -> int:
        return steps_now(self.output)

    def check(self) -> int:
        """Against one that nothing disturbed, which the first such round makes."""
        undisturbed = self.place.folder / "trained"
        if not undisturbed.is_dir():
            log = self.place.folder / "trained.log"
            command = Command.start(
                [*self.launcher, *learning(undisturbed, self.workers)], log, self.place.cluster.environment
            )
            self.commands.append(command)
            if command.end():
                raise ChaosError(f"the undisturbed training failed: {command.words[-3000:]}")
        wrong = unlike(undisturbed, self.output)
        if wrong:
            raise ChaosError(f"not what an undisturbed training of {self.workers} workers learned: {wrong}")
        return steps_now(self.output)


def kind_of(title: str) -> str:
    """Of a worker process on a cluster, by its title."""
    if title.startswith(AGENTS):
        return "agent"
    return "actor" if title.startswith(ACTORS) else "worker"
