"""Disturb labelling and training runs on a cluster of this machine, start the same command again, and compare what
comes of it with an undisturbed run.

    python tests/ray/chaos.py --seed 1 --kills 100 --faults 1000 --minutes 40 --nodes 2
    python tests/ray/chaos.py --seed 1 --nodes 2 --round 7      # one round of those again

The corpus and the tables lie in S3 behind a proxy that makes faults. A round labels the corpus into a new table, or
trains, under one of SCENARIOS, and starts the same command again until it ends well. What must hold after each: every
(image, model) has exactly one row, bit-equal to that of an undisturbed run on one node but for run_id, labeled_at and
attempts; a training has learned the same weights, bit by bit; a run ends by itself only where something gave it a
reason, and says so; nothing stands still (HANG_S without progress ends the program as a failure). Exit status: 0 it
held, and the kills and faults asked for were reached; 1 it did not hold; 2 it held, and the time was up before.
"""

import argparse
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
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "ray")]

import psutil  # noqa: E402
from deltalake import DeltaTable  # noqa: E402
from disturbed import MODELS, ChaosError, Command, delta_storage, digests, labelling, shards, weather  # noqa: E402
from fault_proxy import Fault, FaultProxy  # noqa: E402
from jumping import SHIFT  # noqa: E402
from local_cluster import LocalCluster, LocalNode, outside_environment  # noqa: E402
from rounds import TAKEN_OVER, TICK_S, Cluster, LabelRound, Place, Round, TrainRound  # noqa: E402
from s3_endpoint import serve  # noqa: E402

BUCKET = "chaos"
UNITS, UNIT_IMAGES = 30, 6
REFUSED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
DISK_KB, LARGER_DISK_KB = 1200, 100_000


def quiet(the: LabelRound) -> None:
    """Nothing happens; the rows come from every node."""
    the.finish()
    found = writers(the)
    the.place.say(f"    files by node: {dict(sorted(found.items()))}")
    missing = {node.name for node in the.place.nodes.nodes} - found.keys()
    if missing:
        raise ChaosError(f"expected files from every node, got none from {sorted(missing)}")


def kills(the: LabelRound) -> None:
    """Actors, task workers and drivers die."""
    the.kill_often(the.kinds, the.place.kills)


def nodes(the: LabelRound) -> None:
    """Nodes die in the middle, others come, and actors die beside them."""
    the.kill_often(("node", "actor", "actor"), the.place.kills // 2)


def head(the: LabelRound) -> None:
    """The head's raylet or its GCS dies, and with it the cluster."""
    the.kill_often(("head",), 1)


def storage(the: LabelRound) -> None:
    """Storage is unwell all the time."""
    the.place.proxy.faults += weather(the.rng, 0.04)
    the.reasons.add("faults")
    the.finish()


def storage_and_kills(the: LabelRound) -> None:
    """Both at once."""
    the.place.proxy.faults += weather(the.rng, 0.02)
    the.reasons.add("faults")
    the.kill_often(the.kinds, the.place.kills)


def refused(the: LabelRound) -> None:
    """Storage refuses everything in the middle of the run, until somebody repairs the key."""
    command = the.start()
    the.wait_for_more(command, 0)
    the.pause(command, 2.0)
    the.reasons.add("refused")
    refusal = Fault(status=403, body=REFUSED)
    the.place.proxy.faults.append(refusal)
    code = command.end()
    if code == 0 and refusal.happened:
        raise ChaosError("a run that storage refused says that all is well")
    if code and not re.search("403|Forbidden|AccessDenied|Access Denied|permission", command.words):
        raise ChaosError(f"expected a word about the refusal, got: {command.words[-2000:]}")
    the.place.forget_faults()
    if not the.ended(command):
        the.finish()


def two_drivers(the: LabelRound) -> None:
    """The same command is started twice by mistake: one of them stops, and the other does it all."""
    first = the.start()
    the.pause(first, 12.0)
    the.reasons.add("second driver")
    second = the.start()
    the.place.tally.events["second driver"] += 1
    while first.running or second.running:
        the.look()
        time.sleep(TICK_S)
    ended = [the.ended(command) for command in (first, second)]
    if not any(ended):
        the.finish()
    stopped = [command for command, well in zip((first, second), ended, strict=True) if not well]
    if any(TAKEN_OVER not in command.words for command in stopped):
        raise ChaosError(f"expected {TAKEN_OVER!r}, got: {stopped[0].words[-2000:]}")


def sigterm(the: LabelRound) -> None:
    """The driver is told to go, as a spot instance or `ray job stop` does: it commits, says so, and exits 130."""
    command = the.start()
    the.wait_for_more(command, 0)
    the.pause(command, 2.0)
    the.reasons.add("sigterm")
    if command.running:
        command.process.send_signal(signal.SIGTERM)
        the.place.tally.events["SIGTERM driver"] += 1
    if not the.ended(command):
        if "interrupted; what is committed stays" not in command.words:
            raise ChaosError(f"expected a word about what is kept, got: {command.words[-2000:]}")
        the.finish()


def sigterm_node(the: LabelRound) -> None:
    """A node is told to go."""
    command = the.start()
    if the.wait_for_more(command, 0):
        the.pause(command, 2.0)
        the.reasons.add("node")
        the.place.tally.events["SIGTERM node"] += 1
        the.lose(the.rng.choice(the.place.nodes.nodes[1:]), LocalNode.stop)
    the.finish(command)


def disk_full(the: LabelRound) -> None:
    """The disk that the table is on is full in the middle, until somebody makes it larger."""
    folder = the.place.folder / f"disk-{the.number}"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_KB}k", "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        the.place.say(f"    left out, no disk of its own: {mounted.stderr.strip()}")
        the.finish()
        return
    the.stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
    the.uri, the.storage, the.direct = str(folder / "labels"), {}, {}
    command = the.start()
    the.reasons.add("disk")
    if command.end() == 0:
        raise ChaosError("a run whose disk was full says that all is well")
    if "No space left on device" not in command.words:
        raise ChaosError(f"expected a word about the disk, got: {command.words[-2000:]}")
    the.place.tally.events["disk full"] += 1
    the.ended(command)
    the.place.say(f"    {the.look()} rows when the disk was full")
    subprocess.run(["mount", "-o", f"remount,size={LARGER_DISK_KB}k", str(folder)], check=True)
    the.finish()


def clock(the: LabelRound) -> None:
    """The driver's clock jumps by years in the middle, and the next driver's is elsewhere again."""
    shift = the.place.folder / f"clock-{the.number}"
    the.launcher = [str(REPOSITORY / "tests" / "ray" / "jumping.py"), the.job]
    the.variables = {SHIFT: str(shift)}
    for days in (-400, 4000):
        shift.write_text(str(the.rng.randrange(-100, 100) * 3600))
        command = the.start()
        if the.wait_for_more(command, the.look()):
            shift.write_text(str(days * 86400))
            the.place.tally.events["clock jump"] += 1
            the.wait_for_more(command, the.look())
        the.kill("driver", command)
        if the.ended(command):
            return
    the.finish()


def training(the: TrainRound) -> None:
    """Workers, drivers and nodes of a training die."""
    the.kill_often(("actor", "node", "driver"), the.place.kills // 3)


SCENARIOS: dict[str, Callable[[LabelRound], None]] = {
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
    "disk full": disk_full,
    "clock": clock,
}
TRAINING: dict[str, Callable[[TrainRound], None]] = {"training": training}
OF_SEVERAL_NODES = {"nodes", "sigterm node", "training"}


def writers(the: LabelRound) -> Counter[str]:
    """Data files of the round's table by the node whose process wrote them."""
    prefix = f"/{the.uri.removeprefix('s3://')}/model"
    found: Counter[str] = Counter()
    for request in the.place.proxy.requests:
        if request.method == "PUT" and request.path.startswith(prefix) and request.outcome == 200:
            name = re.search(r"app/(\S+)", request.agent)
            found[name[1] if name else "driver"] += 1
    return found


def prepare(
    stack: ExitStack,
    cluster: Cluster,
    label_alone: Callable[[list[str], Path], None],
    *,
    seed: int,
    minutes: float,
    units: int = UNITS,
    kills: int = 12,
) -> Place:
    """A server with the corpus, a proxy before it, and the rows of a run that nothing disturbs.

    label_alone: is given the arguments of that run, and a file for its words. kills: of one round.
    """
    deadline = time.monotonic() + 60 * minutes
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maskmill-chaos-")))
    s3 = stack.enter_context(serve(folder / "s3.log"))
    proxy = stack.enter_context(FaultProxy(s3.options["endpoint_url"]))
    s3.bucket(BUCKET)
    for name, data in shards(units, UNIT_IMAGES).items():
        s3.client.put_object(Bucket=BUCKET, Key=f"shards/{name}", Body=data)
    source, output = f"s3://{BUCKET}/shards", str(folder / "undisturbed")
    label_alone(labelling(source, output, s3.options), folder / "undisturbed.log")
    expected, count = digests(DeltaTable(output)), units * UNIT_IMAGES * len(MODELS)
    if len(expected) != count:
        raise ChaosError(f"expected {count} rows, the undisturbed run made {len(expected)}")
    patience = {"retries": {"max_attempts": 4, "mode": "standard"}, "read_timeout": 5}
    through = {**s3.options, "endpoint_url": proxy.uri, "config_kwargs": patience}
    return Place(
        seed,
        cluster,
        proxy,
        source,
        f"s3://{BUCKET}/labels",
        through,
        delta_storage(s3),
        folder,
        expected,
        deadline,
        kills,
    )


def label_on_one_node(arguments: list[str], log: Path) -> None:
    """A run on a Ray of its own. Raises ChaosError."""
    command = Command.start(["-m", "jobs.label", *arguments], log, outside_environment())
    try:
        code = command.end()
    finally:
        command.clear()
    if code:
        raise ChaosError(f"the undisturbed run failed: {command.words[-3000:]}")


def run(place: Place, name: str, number: int, disturb: Callable[[LabelRound], None] | None = None) -> None:
    """One round, of a scenario of that name or of one's own. Raises ChaosError."""
    began = time.monotonic()
    tally = place.tally
    before = tally.kills.total()
    place.proxy.requests.clear()
    the: Round = TrainRound(place, number) if name in TRAINING else LabelRound(place, number)
    try:
        if isinstance(the, TrainRound):
            TRAINING[name](the)
        elif isinstance(the, LabelRound):
            (disturb or SCENARIOS[name])(the)
        place.forget_faults()
        checked = the.check()
    finally:
        place.forget_faults()
        the.clear()
    tally.rounds += 1
    tally.rows += checked if the.job == "label" else 0
    place.say(
        f"round {number} {name}: {time.monotonic() - began:.0f} s, {len(the.commands)} starts, "
        f"{tally.kills.total() - before} kills, {tally.faults.total()} faults so far; "
        + (f"{checked} rows as expected" if the.job == "label" else f"weights after {checked} steps as expected")
    )


def program(nodes: int) -> Iterator[tuple[int, str]]:
    """(number, scenario) of the rounds, all scenarios in turn."""
    number = 0
    while True:
        for name in (*SCENARIOS, *TRAINING):
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
    parser.add_argument("--round-kills", type=int, default=12, help="kills of one round; some have a part of it")
    parser.add_argument("--round", type=int, help="only this one")
    parser.add_argument("--scenario", choices=(*SCENARIOS, *TRAINING), action="append", help="only rounds of these")
    given = parser.parse_args(argv)
    print(f"seed {given.seed}, {given.nodes} nodes", flush=True)
    # The cluster, the server and the runs end with this program, also where a time limit from outside ends it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    number = -1
    with ExitStack() as stack:
        try:
            cluster = LocalCluster(nodes=given.nodes)
            place = prepare(
                stack,
                cluster,
                label_on_one_node,
                seed=given.seed,
                minutes=given.minutes,
                kills=given.round_kills,
            )
            stack.enter_context(cluster)
            for number, name in program(given.nodes):
                if given.round is not None and number > given.round:
                    break
                if (given.round not in (None, number)) or (given.scenario and name not in given.scenario):
                    continue
                tally = place.tally
                if place.late or (tally.kills.total() >= given.kills and tally.faults.total() >= given.faults):
                    break
                run(place, name, number)
        except (ChaosError, RuntimeError, OSError, psutil.Error) as error:
            if not isinstance(error, ChaosError):
                traceback.print_exc()
            print(f"FAILED in round {number}: {error}")
            print(
                f"replay: --seed {given.seed} --nodes {given.nodes} --round-kills {given.round_kills} --round {number}"
            )
            return 1
        print(place.tally)
        if place.tally.rounds:
            print("0 rows lost, 0 doubled, 0 differ, 0 hangs")
        alone = given.round is not None
        reached = place.tally.kills.total() >= given.kills and place.tally.faults.total() >= given.faults
        if not (alone or reached):
            print(f"the time was up before {given.kills} kills and {given.faults} faults")
        return 0 if alone or reached else 2


if __name__ == "__main__":
    sys.exit(main())
