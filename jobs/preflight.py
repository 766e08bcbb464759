"""Before a long run: `maskmill preflight CONFIG [dotted.key=value ...] [--units K] [--json] [--apply [PATH]]`."""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import torch

from jobs.common import guarded
from pipeline.config import LabelConfig
from pipeline.config_train import TrainConfig
from pipeline.configfile import MAX_YAML_BYTES, load_config, load_overrides, load_yaml
from pipeline.dataflow import cluster
from pipeline.dataflow.preflight import cluster_nodes, measure_on
from pipeline.errors import ConfigError, StorageError
from pipeline.models.load import check_models
from pipeline.preflight.apply import applied, default_path, write_copy
from pipeline.preflight.checks import Measure, Report, check
from pipeline.preflight.measure import Measured, Options, measure
from pipeline.preflight.propose import Node
from pipeline.preflight.sampling import Corpus
from pipeline.preflight.text import lines
from pipeline.printable import PrintableConsole
from pipeline.sources.base import Unit
from pipeline.storage import read_bytes

__all__ = ["main", "preflight"]

EXIT_PROBLEM = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 fine, 1 a problem that would stop or spoil the run, 2 a bad config."""
    parser = argparse.ArgumentParser(
        "maskmill preflight",
        description="what a label or train run would meet, found out on a sample before it starts",
        epilog="exit codes: 0 fine; 1 a problem that would stop or spoil the run; 2 a bad config",
    )
    parser.add_argument(
        "given", nargs="+", metavar="CONFIG | dotted.key=value", help="as for the run itself, label or train"
    )
    parser.add_argument("--units", type=_count, default=8, metavar="K", help="units to look at (8), spread over all")
    parser.add_argument("--images", type=_count, default=64, metavar="N", help="images of each unit at most (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of units and images (0)")
    parser.add_argument("--seconds", type=float, default=90.0, metavar="S", help="for trials of the models, about (90)")
    parser.add_argument("--nodes", type=_count, metavar="N", help="project for a cluster of N nodes")
    parser.add_argument("--node-cpus", type=float, metavar="C", help="cores of each (those of this machine)")
    parser.add_argument("--node-gpus", type=float, metavar="G", help="GPUs of each (those of this machine)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--apply", nargs="?", const="", metavar="PATH", help="write a copy of the config with what is proposed"
    )
    arguments = parser.parse_intermixed_args(argv)
    given = arguments.given
    if arguments.apply and "=" in arguments.apply:  # --apply source.limit=100
        given, arguments.apply = [*given, arguments.apply], ""
    configs = [item for item in given if "=" not in item]
    if len(configs) > 1:
        parser.error(f"expected one CONFIG, got {', '.join(configs)}")
    arguments.config = configs[0] if configs else None
    arguments.overrides = [item for item in given if "=" in item]
    return guarded(lambda: _preflight(arguments))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _preflight(arguments: argparse.Namespace) -> int:
    config = _config(arguments.config, arguments.overrides)
    target = None
    if arguments.apply is not None:
        if isinstance(config, TrainConfig):
            raise ConfigError("--apply has nothing to propose for a train config, expected a label config")
        if not arguments.apply and arguments.config is None:
            raise ConfigError("--apply needs a PATH where there is no CONFIG")
        target = Path(arguments.apply) if arguments.apply else default_path(arguments.config)
    stated = (arguments.nodes, arguments.node_cpus, arguments.node_gpus)
    options = Options(
        units=arguments.units,
        images=arguments.images,
        seed=arguments.seed,
        trial_s=arguments.seconds * 2 / 3,
        rehearsal_s=arguments.seconds / 3,
    )
    report = preflight(config, options, *stated)
    if arguments.json:
        print(json.dumps(report.plain(), indent=1))
    else:
        console = PrintableConsole(soft_wrap=True)
        for line in lines(report):
            console.print(line)
    if target is not None:
        _apply(report, arguments.config, arguments.overrides, target)
    return EXIT_PROBLEM if report.findings.problems else 0


def _config(uri: str | None, overrides: Sequence[str]) -> LabelConfig | TrainConfig:
    """The config of whichever job has such sections. Raises ConfigError; a file that cannot be read is one too."""
    try:
        text = "{}" if uri is None else read_bytes(uri, max_bytes=MAX_YAML_BYTES).decode("utf-8", "replace")
        tree = load_yaml(text, str(uri))
        tree = load_overrides(overrides, tree) if isinstance(tree, dict) else {}
        if "model" in tree or "epochs" in tree:
            return load_config(TrainConfig, uri, overrides)
        config = load_config(LabelConfig, uri, overrides)
    except StorageError as error:
        raise ConfigError(str(error)) from error
    # Weights that cannot be read are a problem of the model, which is told with all others.
    with contextlib.suppress(StorageError):
        check_models(config.models)
    return config


def preflight(
    config: LabelConfig | TrainConfig,
    options: Options,
    nodes: int | None = None,
    node_cpus: float | None = None,
    node_gpus: float | None = None,
) -> Report:
    """Check a config where it would run: on the Ray cluster that it names, else in a process of this machine.

    nodes, node_cpus, node_gpus: project for those instead. Raises ConfigError.
    """
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    here = Node(
        float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count()), float(psutil.virtual_memory().total)
    )
    found = [here]
    how: Measure = _measure_here
    if address and address != "local":
        cluster.connect(config.ray_address)
        found = cluster_nodes()
        how = functools.partial(measure_on, cluster.plan_pool(config.resources))
        options = Options(**{**options.__dict__, "probe": True})
    if nodes is not None or node_cpus is not None or node_gpus is not None:
        like = max(found, key=lambda node: (node.gpus, node.cpus))
        one = Node(like.cpus if node_cpus is None else node_cpus, like.gpus if node_gpus is None else node_gpus, None)
        found = [one] * (nodes or 1)
    return check(config, options, found, how)


def _measure_here(
    config: LabelConfig | TrainConfig, units: Sequence[Unit], corpus: Corpus, options: Options
) -> Measured:
    """`measure` in a process of its own with a worker's environment: memory is counted from nothing, and what ends it
    ends it alone. Raises RunError."""
    before = dict(os.environ)
    os.environ.update(cluster.ENVIRONMENT["env_vars"])
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure, config, units, corpus, options).result()
    except BrokenProcessPool as error:
        raise StorageError(
            "the process that tried the models was ended, as by the system when memory ran out"
        ) from error
    finally:
        os.environ.clear()
        os.environ.update(before)


def _apply(report: Report, original: str | None, overrides: Sequence[str], target: Path) -> None:
    if report.proposal is None or not report.proposal.values:
        print("maskmill: nothing is applied: there is no proposal", file=sys.stderr)
        return
    text = "{}" if original is None else read_bytes(original, max_bytes=MAX_YAML_BYTES).decode()
    copy, left_out = applied(text, overrides, report.proposal.values)
    write_copy(original, target, copy)
    again = "".join(f" {name}=..." for name in left_out)
    print(f"wrote {target}: maskmill label {target}{again}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
