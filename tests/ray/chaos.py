"""Disturb labelling runs on a cluster of this machine, start the same command again, and compare each table with the
one of an undisturbed run on one node.

    python tests/ray/chaos.py --seed 1 --kills 100 --faults 1000 --minutes 25 --nodes 2
    python tests/ray/chaos.py --seed 1 --nodes 2 --round 7      # one round of those again

The corpus and the table lie in S3 behind a proxy that makes faults. A round labels the corpus into a new table under
one of SCENARIOS, and starts the same command again until it ends well. What must hold after each: every (image, model)
has exactly one row, bit-equal but for run_id, labeled_at and attempts; a run ends by itself only where something gave
it a reason, and says so; nothing stands still (HANG_S without a new row ends the program as a failure). Exit status: 0
it held, and the kills and faults asked for were reached; 1 it did not hold; 2 it held, and the time was up before.
"""

import argparse
import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "ray")]

import psutil  # noqa: E402
from deltalake import DeltaTable  # noqa: E402
from deltalake.exceptions import DeltaError  # noqa: E402
from fault_proxy import Fault, FaultProxy  # noqa: E402
from job_helpers import jpeg, tar_bytes  # noqa: E402
from local_cluster import LocalCluster, LocalNode, outside_environment  # noqa: E402
from s3_endpoint import S3, serve  # noqa: E402

BUCKET = "chaos"
UNITS, UNIT_IMAGES = 30, 6
MODELS = ("unet_small", "null_model")
# What may differ between two runs of the same rows.
PROVENANCE = {"run_id", "labeled_at", "attempts"}
HANG_S = 300.0
TICK_S = 0.1
KILLED = -signal.SIGKILL
ACTOR = "ray::MapWorker"
# Not the run's: a raylet ends with its agents, which is what kills of nodes are for.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
TAKEN_OVER = "another run has taken over"
REFUSED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
BROKEN = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


class ChaosError(Exception):
    """What must hold did not."""


# ---- what is labelled, and how its table is read


def shards(units: int = UNITS, unit_images: int = UNIT_IMAGES) -> dict[str, bytes]:
    """Tar shards of small scenes, by name."""
    return {
        f"{unit:03}.tar": tar_bytes(
            {f"{index}.jpg": jpeg(unit * unit_images + index, 64, 48) for index in range(unit_images)}
        )
        for unit in range(units)
    }


def labelling(
    source: str, output: str, source_storage: dict[str, Any] | None = None, storage: dict[str, Any] | None = None
) -> list[str]:
    """Arguments of a labelling run with small windows, so that there is always something half done."""
    given = [("source", source_storage), ("output", storage)]
    return [
        "source.format=webdataset",
        f"source.uri={source}",
        "models.0.name=unet_small",
        "models.0.weights=bundled:unet_small_scenes",
        "models.1.name=null_model",
        f"output.uri={output}",
        "output.rows_per_file=2",
        "output.commit_interval_s=0.5",
        "resources.torch_threads=1",
        "resources.decode_threads=2",
        *(f"{name}.storage={json.dumps(options)}" for name, options in given if options),
    ]


def digests(table: DeltaTable) -> dict[tuple[str, str], str]:
    """{(image_id, model): digest of its row without PROVENANCE}. Raises ChaosError where a row failed or is doubled."""
    found: dict[tuple[str, str], str] = {}
    for row in table.to_pyarrow_table().to_pylist():
        key = (row["image_id"], row["model"])
        if key in found:
            raise ChaosError(f"{key} has two rows")
        if row["status"] != "ok":
            raise ChaosError(f"{key} is {row['status']}: {row['error_type']}: {row['error_message']}")
        kept = sorted((name, value) for name, value in row.items() if name not in PROVENANCE)
        found[key] = hashlib.blake2b(repr(kept).encode(), digest_size=16).hexdigest()
    return found


def difference(expected: dict[tuple[str, str], str], found: dict[tuple[str, str], str]) -> str:
    """What is wrong with `found`, empty where nothing is."""
    lost = sorted(expected.keys() - found.keys())
    added = sorted(found.keys() - expected.keys())
    other = [key for key in expected.keys() & found.keys() if expected[key] != found[key]]
    if not (lost or added or other):
        return ""
    return f"{len(lost)} rows lost, {len(added)} too many, {len(other)} differ: {(lost or added or other)[:3]}"


def delta_storage(s3: S3) -> dict[str, str]:
    """How deltalake reaches the server itself."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_ENDPOINT_URL": str(s3.options["endpoint_url"]),
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
    }


def rows_now(uri: str, storage: dict[str, str] | None = None) -> int:
    """Committed rows, 0 before there is a table."""
    try:
        actions = pa.table(DeltaTable(uri, storage_options=storage).get_add_actions(flatten=True))
    except (DeltaError, OSError):
        return 0
    return sum(actions.column("num_records").to_pylist())


def weather(rng: random.Random, share: float) -> list[Fault]:
    """Faults of every kind that a client meets in object storage, each in about `share` of the requests."""

    def fault(weight: float = 1.0, **options: Any) -> Fault:
        return Fault(share=weight * share, chance=random.Random(rng.random()), **options)

    return [
        fault(status=503),
        fault(status=500, body=BROKEN),
        fault(what="reset"),
        fault(what="reset", forwarded=True),  # done, but nobody knows
        fault(what="cut", method="GET"),
        fault(what="stale", method="GET", path="list-type"),
        fault(0.1, what="stall", seconds=6.0),
    ]


# ---- what happens to a run


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


@dataclass
class Command:
    """A job as a process of its own. log: where its words go."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @classmethod
    def start(cls, job: str, arguments: list[str], log: Path, environment: dict[str, str]) -> "Command":
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", f"jobs.{job}", *arguments],
                cwd=REPOSITORY,
                stdout=sink,
                stderr=sink,
                env={**environment, "PYTHONPATH": str(REPOSITORY)},
                start_new_session=True,
            )
        return cls(process, log)

    @property
    def words(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def end(self, timeout_s: float = HANG_S) -> int:
        """The exit code. Raises ChaosError where it does not end by itself."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ChaosError(f"hangs: still there after {timeout_s:g} s: {self.words[-2000:]}") from None

    def clear(self) -> None:
        """End it whatever it does."""
        if self.running:
            self.process.kill()
            self.process.wait()


class Round:
    """One table from its first row to its last, through whatever `disturb` does. rng: of this round alone."""

    def __init__(self, chaos: "Chaos", number: int) -> None:
        self.chaos = chaos
        self.number = number
        self.rng = random.Random(f"{chaos.seed}:{number}")
        self.uri = f"s3://{BUCKET}/labels-{number}"
        self.reasons: set[str] = set()
        self.commands: list[Command] = []
        self._last_rows = -1
        self._progress = time.monotonic()

    def start(self) -> Command:
        """The command again, the same."""
        chaos = self.chaos
        log = chaos.folder / f"round{self.number}-{len(self.commands)}.log"
        arguments = labelling(f"s3://{BUCKET}/shards", self.uri, chaos.through, chaos.through)
        self.commands.append(Command.start("label", arguments, log, chaos.cluster.environment))
        chaos.tally.starts += 1
        self.progress()
        return self.commands[-1]

    def progress(self) -> None:
        """Something happened: no hang so far."""
        self._progress = time.monotonic()

    def rows(self) -> int:
        """Rows now. Raises ChaosError where nothing has changed for too long."""
        rows = rows_now(self.uri, self.chaos.direct)
        if rows != self._last_rows:
            self._last_rows = rows
            self.progress()
        if time.monotonic() - self._progress > HANG_S:
            raise ChaosError(f"hangs: {rows} rows for {HANG_S:g} s: {self.commands[-1].words[-2000:]}")
        return rows

    def wait_for_rows(self, command: Command, more_than: int) -> bool:
        """Until there are more rows; whether the run goes on."""
        while command.running:
            if self.rows() > more_than:
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
                self.rows()
                time.sleep(TICK_S)
            if self.ended(command):
                return
            command = self.start()

    def ended(self, command: Command) -> bool:
        """Whether all is labelled. Raises ChaosError where a run stopped without a reason."""
        code, words = command.end(), command.words
        self.chaos.tally.ends[str(code)] += 1
        if code == 0:
            return True
        line = next((line for line in words.splitlines()[::-1] if "maskmill: error" in line), words[-200:].strip())
        self.chaos.say(f"    run ended with {code}: {line[:240]}")
        reasons = {
            KILLED: {"driver"},
            130: {"sigterm"},
            4: {"faults", "head", "second driver", "refused", "worker"},
        }.get(code, {"head"})
        if not (reasons & self.reasons):
            raise ChaosError(f"a run ended with {code} after {sorted(self.reasons)}: {words[-3000:]}")
        if TAKEN_OVER in words and not {"second driver", "faults"} & self.reasons:
            raise ChaosError(f"a run was taken over by nobody: {words[-3000:]}")
        return False

    def check(self) -> None:
        """Raises ChaosError where the table is not that of the undisturbed run."""
        found = digests(DeltaTable(self.uri, storage_options=self.chaos.direct))
        self.chaos.tally.rows += len(found)
        wrong = difference(self.chaos.expected, found)
        if wrong:
            raise ChaosError(wrong)

    def clear(self) -> None:
        for command in self.commands:
            command.clear()

    # -- kills

    def kill(self, kind: str, command: Command) -> bool:
        """One kill -9; False where there is nothing of this kind now."""
        cluster = self.chaos.cluster
        if kind == "driver":
            command.process.kill()
            command.process.wait()
        elif kind == "head":
            cluster.nodes[0].service(self.rng.choice(["raylet", "gcs_server"])).kill()
        elif kind == "node":
            if len(cluster.nodes) < 2:
                return False
            self.lose(self.rng.choice(cluster.nodes[1:]), lambda node: node.service("raylet").kill())
        else:
            found = [process for title, process in cluster.workers() if kind_of(title) == kind]
            if not found:
                return False
            try:
                self.rng.choice(found).kill()
            except psutil.NoSuchProcess:
                return False
        self.reasons.add(kind)
        self.chaos.tally.kills[kind] += 1
        self.progress()
        return True

    def lose(self, node: LocalNode, end: Callable[[LocalNode], None]) -> None:
        """A node goes, and after a moment another one comes."""
        cluster = self.chaos.cluster
        cluster.nodes.remove(node)
        end(node)
        node.wait()
        self.progress()
        cluster.add()
        self.progress()

    def kill_often(self, kinds: tuple[str, ...], times: int) -> None:
        """Kills at random moments of the run, sometimes of several at once, then the rest in peace."""
        command = self.start()
        while times and not self.chaos.late:
            before = self.rows()
            # Sometimes while it starts up or recovers, mostly in the middle of the work.
            if self.rng.random() < 0.6:
                self.wait_for_rows(command, before)
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
        self.chaos.cluster.stop()
        self.chaos.cluster.start()
        self.progress()


def kind_of(title: str) -> str:
    """Of a worker process on a cluster, by its title."""
    if title.startswith(AGENTS):
        return "agent"
    return "actor" if title.startswith(ACTOR) else "worker"


# ---- scenarios


def quiet(the: Round) -> None:
    """Nothing happens; the rows come from every node."""
    the.finish()
    writers = the.chaos.writers(the.uri)
    the.chaos.say(f"    files by node: {dict(sorted(writers.items()))}")
    missing = {node.name for node in the.chaos.cluster.nodes} - writers.keys()
    if missing:
        raise ChaosError(f"expected files from every node, got none from {sorted(missing)}")


def kills(the: Round) -> None:
    """Actors, task workers and drivers die."""
    the.kill_often(("actor", "actor", "worker", "driver"), 12)


def nodes(the: Round) -> None:
    """Nodes die in the middle, others come, and actors die beside them."""
    the.kill_often(("node", "actor", "actor"), 6)


def head(the: Round) -> None:
    """The head's raylet or its GCS dies, and with it the cluster."""
    the.kill_often(("head",), 1)


def storage(the: Round) -> None:
    """Storage is unwell all the time."""
    the.chaos.proxy.faults += weather(the.rng, 0.06)
    the.reasons.add("faults")
    the.finish()


def storage_and_kills(the: Round) -> None:
    """Both at once."""
    the.chaos.proxy.faults += weather(the.rng, 0.03)
    the.reasons.add("faults")
    the.kill_often(("actor", "actor", "worker", "driver"), 10)


def refused(the: Round) -> None:
    """Storage refuses everything in the middle of the run, until somebody repairs the key."""
    command = the.start()
    the.wait_for_rows(command, 0)
    the.pause(command, 2.0)
    the.reasons.add("refused")
    refusal = Fault(status=403, body=REFUSED)
    the.chaos.proxy.faults.append(refusal)
    code = command.end()
    if code == 0 and refusal.happened:
        raise ChaosError("a run that storage refused says that all is well")
    if code and not re.search("403|Forbidden|AccessDenied|Access Denied|permission", command.words):
        raise ChaosError(f"expected a word about the refusal, got: {command.words[-2000:]}")
    the.chaos.forget_faults()
    if not the.ended(command):
        the.finish()


def two_drivers(the: Round) -> None:
    """The same command is started twice by mistake: one of them stops, and the other does it all."""
    first = the.start()
    the.pause(first, 12.0)
    the.reasons.add("second driver")
    second = the.start()
    the.chaos.tally.events["second driver"] += 1
    while first.running or second.running:
        the.rows()
        time.sleep(TICK_S)
    ended = [the.ended(command) for command in (first, second)]
    if not any(ended):
        the.finish()
    stopped = [command for command, well in zip((first, second), ended, strict=True) if not well]
    if any(TAKEN_OVER not in command.words for command in stopped):
        raise ChaosError(f"expected {TAKEN_OVER!r}, got: {stopped[0].words[-2000:]}")


def sigterm(the: Round) -> None:
    """The driver is told to go, as a spot instance or `ray job stop` does: it commits, says so, and exits 130."""
    command = the.start()
    the.wait_for_rows(command, 0)
    the.pause(command, 2.0)
    the.reasons.add("sigterm")
    if command.running:
        command.process.send_signal(signal.SIGTERM)
        the.chaos.tally.events["SIGTERM driver"] += 1
    if not the.ended(command):
        the.finish()


def sigterm_node(the: Round) -> None:
    """A node is told to go."""
    command = the.start()
    if the.wait_for_rows(command, 0):
        the.pause(command, 2.0)
        the.reasons.add("node")
        the.chaos.tally.events["SIGTERM node"] += 1
        the.lose(the.rng.choice(the.chaos.cluster.nodes[1:]), LocalNode.stop)
    the.finish(command)


SCENARIOS: dict[str, Callable[[Round], None]] = {
    "quiet": quiet,
    "kills": kills,
    "storage": storage,
    "refused": refused,
    "nodes": nodes,
    "two drivers": two_drivers,
    "storage and kills": storage_and_kills,
    "sigterm": sigterm,
    "head": head,
    "sigterm node": sigterm_node,
}
OF_SEVERAL_NODES = {"nodes", "sigterm node"}


class Chaos:
    """A cluster, a server, a proxy before it, and the table that every round must end with."""

    def __init__(self, stack: ExitStack, *, seed: int, nodes: int, minutes: float) -> None:
        self.seed = seed
        self.deadline = time.monotonic() + 60 * minutes
        self.tally = Tally()
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maskmill-chaos-")))
        self.s3 = stack.enter_context(serve(self.folder / "s3.log"))
        self.proxy = stack.enter_context(FaultProxy(self.s3.options["endpoint_url"]))
        self.direct = delta_storage(self.s3)
        # One try of each request by botocore; s3fs and the object store of deltalake have their own.
        patience = {"retries": {"max_attempts": 0}, "read_timeout": 5}
        self.through = {**self.s3.options, "endpoint_url": self.proxy.uri, "config_kwargs": patience}
        self.s3.bucket(BUCKET)
        for name, data in shards().items():
            self.s3.client.put_object(Bucket=BUCKET, Key=f"shards/{name}", Body=data)
        self.expected = self._undisturbed()
        self.cluster = stack.enter_context(LocalCluster(nodes=nodes))

    @property
    def late(self) -> bool:
        """Whether the time is up: what runs is finished in peace."""
        return time.monotonic() > self.deadline

    def say(self, line: str) -> None:
        print(line, flush=True)

    def _undisturbed(self) -> dict[tuple[str, str], str]:
        """The rows of a run on a Ray of its own, of one node, without the proxy."""
        output = str(self.folder / "undisturbed")
        arguments = labelling(f"s3://{BUCKET}/shards", output, self.s3.options)
        command = Command.start("label", arguments, self.folder / "undisturbed.log", outside_environment())
        try:
            code = command.end()
        finally:
            command.clear()
        if code:
            raise ChaosError(f"the undisturbed run failed: {command.words[-3000:]}")
        rows = digests(DeltaTable(output))
        if len(rows) != UNITS * UNIT_IMAGES * len(MODELS):
            raise ChaosError(f"expected {UNITS * UNIT_IMAGES * len(MODELS)} rows, the undisturbed run made {len(rows)}")
        return rows

    def writers(self, uri: str) -> Counter[str]:
        """Data files under `uri` by the node whose process wrote them."""
        prefix = f"/{uri.removeprefix('s3://')}/model"
        found: Counter[str] = Counter()
        for request in self.proxy.requests:
            if request.method == "PUT" and request.path.startswith(prefix) and request.outcome == 200:
                name = re.search(r"app/(\S+)", request.agent)
                found[name[1] if name else "driver"] += 1
        return found

    def forget_faults(self) -> None:
        """Storage is well again; what it did is counted."""
        for fault in self.proxy.faults:
            name = str(fault.status) if fault.what == "status" else fault.what
            self.tally.faults[f"{name}, answer lost" if fault.forwarded else name] += fault.happened
        self.proxy.faults.clear()

    def run(self, name: str, number: int) -> None:
        """One round. Raises ChaosError."""
        began = time.monotonic()
        before = self.tally.kills.total()
        the = Round(self, number)
        self.proxy.requests.clear()
        try:
            SCENARIOS[name](the)
        finally:
            self.forget_faults()
            the.clear()
        the.check()
        self.tally.rounds += 1
        killed = self.tally.kills.total() - before
        self.say(
            f"round {number} {name}: {time.monotonic() - began:.0f} s, {len(the.commands)} starts, {killed} kills, "
            f"{self.tally.faults.total()} faults so far; {len(self.expected)} rows as expected"
        )


def program(nodes: int) -> Iterator[tuple[int, str]]:
    """(number, scenario) of the rounds, all scenarios in turn."""
    number = 0
    while True:
        for name in SCENARIOS:
            if nodes > 1 or name not in OF_SEVERAL_NODES:
                yield number, name
                number += 1


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=100, help="end after so many kills and as many faults")
    parser.add_argument("--faults", type=int, default=1000, help="of storage")
    parser.add_argument("--minutes", type=float, default=25.0, help="no round begins after that")
    parser.add_argument("--nodes", type=int, default=2, help="of the cluster, with its head")
    parser.add_argument("--round", type=int, help="only this one")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="only rounds of these")
    given = parser.parse_args(argv)
    print(f"seed {given.seed}, {given.nodes} nodes", flush=True)
    # The cluster, the server and the runs end with this program, also where a time limit from outside ends it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    number = -1
    with ExitStack() as stack:
        try:
            chaos = Chaos(stack, seed=given.seed, nodes=given.nodes, minutes=given.minutes)
            for number, name in program(given.nodes):
                if given.round is not None and number > given.round:
                    break
                if (given.round not in (None, number)) or (given.scenario and name not in given.scenario):
                    continue
                tally = chaos.tally
                if chaos.late or (tally.kills.total() >= given.kills and tally.faults.total() >= given.faults):
                    break
                chaos.run(name, number)
        except (ChaosError, RuntimeError, OSError, psutil.Error) as error:
            if not isinstance(error, ChaosError):
                traceback.print_exc()
            print(f"FAILED in round {number}: {error}")
            print(f"replay: --seed {given.seed} --nodes {given.nodes} --round {number}")
            return 1
        print(chaos.tally)
        if chaos.tally.rounds:
            print("0 rows lost, 0 doubled, 0 differ, 0 hangs")
        alone = given.round is not None
        reached = chaos.tally.kills.total() >= given.kills and chaos.tally.faults.total() >= given.faults
        if not (alone or reached):
            print(f"the time was up before {given.kills} kills and {given.faults} faults")
        return 0 if alone or reached else 2


if __name__ == "__main__":
    sys.exit(main())
