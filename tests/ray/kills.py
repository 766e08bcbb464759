"""Kill a labelling run again and again, start the same command again, and compare its table with a clean run's.

    python tests/ray/kills.py --kills 20 --seed 1

Victims are the driver, an actor, and a worker process of the raylet, at random moments. What must hold: each (image,
model) has exactly one row, and every payload is bit-equal to the clean run's. Exit status 0 says it held.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

REPOSITORY = Path(__file__).resolve().parents[2]
VICTIMS = ("driver", "actor", "worker")
PAYLOAD = ["image_id", "position", "model", "model_version", "status", "semantic", "segments", "width", "height"]
START_TIMEOUT_S = 120
RUN_TIMEOUT_S = 600
MAX_NODE_DEATHS = 3


@dataclass
class Report:
    """What a session of kills did."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    starts: int = 0
    node_deaths: int = 0


def arguments(output: Path, count: int, rows_per_file: int) -> list[str]:
    """Of one labelling run, with small windows so that there is always something half done."""
    return [
        "source.format=scenes",
        f"source.count={count}",
        "source.unit_images=20",
        "models.0.name=unet_small",
        "models.0.weights=bundled:unet_small_scenes",
        "models.1.name=null_model",
        f"output.uri={output}",
        f"output.rows_per_file={rows_per_file}",
        "output.commit_interval_s=0.5",
        "resources.torch_threads=1",
        "resources.decode_threads=2",
    ]


def command(output: Path, count: int, rows_per_file: int) -> list[str]:
    """The run as a process."""
    return [sys.executable, "-m", "jobs.label", *arguments(output, count, rows_per_file)]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a run; its words go to `log`."""
    with log.open("ab") as sink:
        return subprocess.Popen(arguments, cwd=REPOSITORY, stdout=sink, stderr=sink, start_new_session=True)


def table_digest(output: Path) -> dict[tuple[str, str], str]:
    """{(image_id, model): digest of its payload}. Raises AssertionError where a key occurs twice."""
    digests: dict[tuple[str, str], str] = {}
    for batch in DeltaTable(str(output)).to_pyarrow_dataset().to_batches(columns=PAYLOAD):
        for row in batch.to_pylist():
            key = (row["image_id"], row["model"])
            assert key not in digests, f"{key} has two rows"
            digests[key] = hashlib.blake2b(repr(sorted(row.items())).encode(), digest_size=16).hexdigest()
    return digests


def victims(driver: psutil.Process, kind: str) -> list[psutil.Process]:
    """Processes of this run alone that a kill of `kind` may take."""
    if kind == "driver":
        return [driver]
    found = []
    for process in driver.children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        is_actor = title.startswith("ray::MapWorker")
        if (kind == "actor" and is_actor) or (kind == "worker" and title.startswith("ray::") and not is_actor):
            found.append(process)
    return found


def rows_now(output: Path) -> int:
    """Committed rows, 0 before there is a table."""
    try:
        actions = DeltaTable(str(output)).get_add_actions(flatten=True)
    except (DeltaError, OSError):
        return 0
    return sum(actions.column("num_records").to_pylist())


def ended_well(process: subprocess.Popen[bytes], report: Report, log: Path) -> bool:
    """Did the run do its work? A Ray node that misses its heartbeats on a busy machine ends its driver: one more death.

    Raises AssertionError where a run failed by itself.
    """
    if process.returncode == 0:
        return True
    words = log.read_text()[-4000:]
    report.node_deaths += 1
    died = process.returncode == 1 and "marked dead" in words
    assert died, f"run ended with {process.returncode}: {words}"
    assert report.node_deaths <= MAX_NODE_DEATHS, f"{report.node_deaths} nodes lost: {words}"
    return False


def kill_session(
    output: Path, *, kills: int, seed: int, count: int, rows_per_file: int, log: Path, kinds: tuple[str, ...] = VICTIMS
) -> Report:
    """Run to the end through `kills` kills; raises AssertionError where a run fails by itself."""
    rng = random.Random(seed)
    report = Report()
    line = command(output, count, rows_per_file)
    deadline = time.monotonic() + RUN_TIMEOUT_S * (1 + kills / 4)
    process: subprocess.Popen[bytes] | None = None
    while True:
        assert time.monotonic() < deadline, f"hangs after {report}"
        if process is None:
            process = start(line, log)
            report.starts += 1
            began = time.monotonic()
            before = rows_now(output)
        left = kills - sum(report.kills.values())
        if left == 0:
            process.wait(timeout=RUN_TIMEOUT_S)
            if ended_well(process, report, log):
                return report
            process = None
            continue
        # Sometimes while it starts up, mostly in the middle of the work.
        if rng.random() < 0.8:
            while process.poll() is None and rows_now(output) <= before and time.monotonic() - began < START_TIMEOUT_S:
                time.sleep(0.1)
        time.sleep(rng.uniform(0.0, 3.0))
        if process.poll() is not None:
            if ended_well(process, report, log):
                # All is labelled and kills are left: half of it starts anew.
                forget_half(output)
            process = None
            continue
        kind = rng.choice(kinds)
        driver = psutil.Process(process.pid)
        candidates = victims(driver, kind)
        if not candidates:
            continue
        victim = rng.choice(candidates)
        tree = driver.children(recursive=True) if kind == "driver" else []
        victim.kill()
        report.kills[kind] += 1
        before = rows_now(output)
        if kind == "driver":
            process.wait()
            # Ray's own processes end with their driver; wait for them as a new cluster's start would.
            psutil.wait_procs(tree, timeout=20)
            process = None


def forget_half(output: Path) -> None:
    """Take every second unit's rows out, as if they had never been labelled."""
    from pipeline.table import RowTable
    from pipeline.units import UnitLog, finished, planned

    table = RowTable.open(str(output), {})
    log = UnitLog(str(output), {})
    log.create(table.take_over())
    lines = log.read()
    shard_ids = sorted(planned(lines).column("shard_id").to_pylist())[::2]
    versions = {line["model_version"] for line in lines.to_pylist() if line["model_version"]}
    log.append_finished([(shard, version, None, None) for shard in shard_ids for version in versions], "forget")
    table.delete_units(shard_ids)
    assert all(not set(shard_ids) & set(finished(log.read(), v).column("shard_id").to_pylist()) for v in versions)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=400, help="scenes")
    parser.add_argument("--rows-per-file", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="maskmill-kills-") as folder:
        base = Path(folder)
        clean = start(command(base / "clean", given.count, given.rows_per_file), base / "clean.log")
        assert clean.wait(timeout=RUN_TIMEOUT_S) == 0, (base / "clean.log").read_text()
        expected = table_digest(base / "clean")
        report = kill_session(
            base / "killed",
            kills=given.kills,
            seed=given.seed,
            count=given.count,
            rows_per_file=given.rows_per_file,
            log=base / "killed.log",
        )
        got = table_digest(base / "killed")
        assert len(expected) == 2 * given.count
        assert got == expected, f"{sum(got.get(k) != v for k, v in expected.items())} rows differ"
        lost = f", {report.node_deaths} nodes lost to the machine's load" if report.node_deaths else ""
        print(f"{report.kills} in {report.starts} starts{lost}: {len(got)} rows, each once, bit-equal to the clean run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
