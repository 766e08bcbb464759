"""Runs of jobs that a test disturbs: what they label or learn, each as a process of its own, and how a table is held
against another."""

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from fault_proxy import Fault
from job_helpers import jpeg, tar_bytes
from s3_endpoint import S3
from train_helpers import LEARNING, SCENES, history, weights

from pipeline.training.checkpoint import CheckpointStore

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = ("unet_small", "null_model")
# What may differ between two runs of the same rows.
PROVENANCE = {"run_id", "labeled_at", "attempts"}
HANG_S = 300.0
BROKEN = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


class ChaosError(Exception):
    """What must hold did not."""


def shards(units: int, unit_images: int) -> dict[str, bytes]:
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


@dataclass
class Command:
    """A job as a process of its own. log: where its words go."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @classmethod
    def start(cls, arguments: list[str], log: Path, environment: dict[str, str]) -> "Command":
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, *arguments],
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


def learning(output: Path, workers: int) -> list[str]:
    """Arguments of a training with a checkpoint after each step; no node of two CPUs has room for two workers."""
    return [
        *SCENES,
        *LEARNING,
        "epochs=8",
        "checkpoint.every_steps=1",
        f"resources.workers={workers}",
        "resources.cpus_per_worker=1.5",
        f"output.uri={output}",
    ]


def steps_now(output: Path) -> int:
    """Optimiser steps behind the newest checkpoint, 0 before there is one."""
    checkpoints = CheckpointStore(str(output), {}).list()
    return checkpoints[-1].step if checkpoints else 0


def unlike(one: Path, other: Path) -> str:
    """What tells two trainings apart, empty where nothing does: published weights, bit by bit, and their history."""
    first, second = weights(one), weights(other)
    if first.keys() != second.keys():
        return f"other tensors: {sorted(first.keys() ^ second.keys())[:3]}"
    differing = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    if differing:
        return f"{len(differing)} of {len(first)} tensors differ: {differing[:3]}"
    return "" if history(one) == history(other) else "the figures of their epochs differ"
