"""A job on a cluster: `maskmill submit JOB CONFIG.yaml [key=value ...] --address http://HEAD:8265`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.common import guarded
from pipeline.config import EvaluateConfig, LabelConfig, PackConfig, Section
from pipeline.config_export import ExportConfig
from pipeline.config_train import TrainConfig
from pipeline.configfile import load_config, redacted
from pipeline.dataflow import submission
from pipeline.errors import EXIT_INTERRUPTED, ConfigError
from pipeline.printable import printable, printable_log

__all__ = ["main"]

CONFIGS: dict[str, type[Section]] = {
    "label": LabelConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "pack": PackConfig,
    "export": ExportConfig,
}
OTHERS = ("report", "compare", "status", "preview", "models")
# Addresses with a place of their own; anything else is a path on whichever node the job's driver runs.
SCHEME = "://"
SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        "maskmill submit",
        description="send a job to a Ray cluster, follow its output, and end with its exit code; the same line again "
        "goes on where the job stopped",
    )
    parser.add_argument("job", nargs="?", help=f"{', '.join([*CONFIGS, *OTHERS])}")
    parser.add_argument("arguments", nargs="*", help="the job's own: CONFIG.yaml [dotted.key=value ...]")
    parser.add_argument(
        "--address", help="the cluster's job server, http://HEAD:8265 (default: $RAY_API_SERVER_ADDRESS)"
    )
    parser.add_argument("--no-wait", action="store_true", help="do not follow: print the job's id and leave")
    parser.add_argument("--id", default="", help="the job's id (default: one that is free)")
    parser.add_argument("--working-dir", type=Path, help="a folder that travels along, where the job runs")
    parser.add_argument("--extra", action="append", default=[], help="an extra of maskmill to install on the cluster")
    parser.add_argument("--pip", action="append", default=[], help="a requirement to install on the cluster")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for all of its processes")
    parser.add_argument(
        "--installed", action="store_true", help="the cluster has this version of maskmill: send no code"
    )
    parser.add_argument("--cpus", type=float, help="CPUs to reserve for the driver")
    parser.add_argument("--gpus", type=float, help="GPUs to reserve for the driver")
    actions = parser.add_mutually_exclusive_group()
    for action, meaning in (
        ("status", "say how a job is"),
        ("logs", "follow a job that was submitted before"),
        ("stop", "end a job; what it committed stays"),
    ):
        actions.add_argument(f"--{action}", metavar="ID", help=f"{meaning}, instead of submitting one")
    arguments = parser.parse_intermixed_args(argv)
    return guarded(lambda: _submit(arguments))


def _submit(arguments: argparse.Namespace) -> int:
    address = arguments.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise ConfigError("--address must be the cluster's job server, as in http://HEAD:8265")
    earlier = arguments.status or arguments.logs or arguments.stop
    if earlier and arguments.job:
        raise ConfigError(f"expected a job to submit or one to look at, got {arguments.job!r} and {earlier!r}")
    # Before the cluster is asked: a config that is wrong is wrong without one.
    job = None if earlier else _prepared(arguments)
    client = submission.connect(address)
    if arguments.status:
        print(printable(f"{arguments.status}: {submission.status(client, arguments.status)}"))
        return 0
    if arguments.stop:
        stopped = submission.stop(client, arguments.stop)
        print(f"{arguments.stop}: {'asked to stop' if stopped else 'it had ended'}")
        return 0
    name = arguments.logs or ""
    if job is not None:
        name = submission.send(client, job)
        print(f"submitted {name}", flush=True)
        if arguments.no_wait:
            print(f"  maskmill submit --logs {name} --address {address}    --status, --stop alike")
            return 0
    try:
        submission.follow(client, name, lambda text: print(printable_log(text), end="", flush=True))
    except KeyboardInterrupt:
        print(
            f"\nthe job goes on: maskmill submit --logs {name} --address {address} follows it, --stop {name} ends it",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    return submission.exit_code(client, name)


def _prepared(arguments: argparse.Namespace) -> submission.Submission:
    """What the arguments ask for, checked. Raises ConfigError."""
    job, given = arguments.job, list(arguments.arguments)
    if job not in CONFIGS and job not in OTHERS:
        raise ConfigError(f"expected one of the jobs {', '.join([*CONFIGS, *OTHERS])}, got {job!r}")
    config = None
    if job in CONFIGS:
        uri = given.pop(0) if given and "=" not in given[0] else None
        config = load_config(CONFIGS[job], uri, given)
        given = []
        _check_output(config)
        if redacted(config) != config.model_dump(mode="json"):
            print(
                "maskmill: the config's storage credentials travel with it, and whoever reaches the cluster can read "
                "them; give its nodes credentials of their own where you can",
                file=sys.stderr,
            )
    environment = {}
    for item in arguments.env:
        name, separator, value = item.partition("=")
        if not name or not separator:
            raise ConfigError(f"--env: expected NAME=VALUE, got {item!r}")
        environment[name] = value
    if arguments.working_dir is not None:
        _, kept = submission.travelling(arguments.working_dir)
        if kept:
            shown = ", ".join(map(str, kept[:SHOWN])) + (f" and {len(kept) - SHOWN} more" if len(kept) > SHOWN else "")
            print(printable(f"maskmill: not sent: {shown}"), file=sys.stderr)
    return submission.Submission(
        job=job,
        config=config,
        arguments=tuple(given),
        name=arguments.id,
        working_dir=arguments.working_dir,
        requirements=(*submission.extra_requirements(arguments.extra), *arguments.pip),
        environment=environment,
        installed=arguments.installed,
        cpus=arguments.cpus,
        gpus=arguments.gpus,
    )


def _check_output(config: Section) -> None:
    """A relative path would be a folder of the job's own, which goes with it."""
    uri: str = config.output.uri  # type: ignore[attr-defined]
    if SCHEME not in uri and not Path(uri).is_absolute():
        raise ConfigError(f"output.uri must be a URI or an absolute path that all nodes share, got {uri!r}")


if __name__ == "__main__":
    sys.exit(main())
