"""Settings that make a model faster without changing its labels: `maskmill tune CONFIG [dotted.key=value ...]`."""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jobs.common import guarded
from jobs.driver import signals_interrupt
from pipeline.config import LabelConfig
from pipeline.configfile import MAX_YAML_BYTES, load_config
from pipeline.dataflow.cluster import ENVIRONMENT
from pipeline.errors import ConfigError, StorageError
from pipeline.models.load import check_models
from pipeline.preflight.apply import applied, default_path, write_copy
from pipeline.preflight.sampling import choose_units
from pipeline.printable import PrintableConsole
from pipeline.sources.registry import open_source
from pipeline.storage import read_bytes
from pipeline.tune.apart import Apart
from pipeline.tune.search import Failed, Outcome, Search, Timed, search
from pipeline.tune.settings import AXES, Setting
from pipeline.tune.text import lines
from pipeline.units import plan_table

__all__ = ["main", "tune"]

# Of all models of a run: what is good for one of them may be bad for another.
SHARED_AXES = ("threads", "batch")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        "maskmill tune",
        description="try precision, memory format, batch budget, compiling, threads and input size on a sample, "
        "and write the fastest setting whose labels stay within a tolerance of those in fp32",
    )
    parser.add_argument("given", nargs="+", metavar="CONFIG | dotted.key=value", help="as for maskmill label")
    parser.add_argument("--model", metavar="LABEL", help="which of the config's models (the first)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        metavar="T",
        help="the most that may be lost against fp32: 1 - mIoU, 1 - PQ, or AbsRel of depth (0.01)",
    )
    parser.add_argument("--units", type=int, default=8, metavar="K", help="units of the sample, spread over all (8)")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="images of each unit at most (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of units and images (0)")
    parser.add_argument("--axes", default=",".join(AXES), help=f"what is tried, of {','.join(AXES)} (all)")
    parser.add_argument(
        "--seconds", type=float, default=600.0, metavar="S", help="after which nothing new is tried (600)"
    )
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="seconds of one setting at most (300)")
    parser.add_argument("--json", action="store_true", help="print all trials as JSON")
    parser.add_argument("--out", metavar="PATH", help="the config to write (CONFIG.tuned.yaml)")
    arguments = parser.parse_intermixed_args(argv)
    configs = [item for item in arguments.given if "=" not in item]
    if len(configs) > 1:
        parser.error(f"expected one CONFIG, got {', '.join(configs)}")
    arguments.config = configs[0] if configs else None
    arguments.overrides = [item for item in arguments.given if "=" in item]

    def body() -> int:
        with signals_interrupt():  # so that what was started ends with it
            return _tune(arguments)

    return guarded(body)


def _tune(arguments: argparse.Namespace) -> int:
    axes = [axis for axis in AXES if axis in arguments.axes.split(",")]
    unknown = sorted(set(arguments.axes.split(",")) - set(AXES))
    if unknown:
        raise ConfigError(f"--axes must be of {', '.join(AXES)}, got {unknown[0]!r}")
    for name in ("units", "images", "seconds", "limit"):
        if not getattr(arguments, name) > 0:
            raise ConfigError(f"--{name} must be above 0, got {getattr(arguments, name)}")
    if not 0 <= arguments.tolerance < math.inf:
        raise ConfigError(f"--tolerance must be 0 or more, got {arguments.tolerance}")
    if arguments.config is None and arguments.out is None:
        raise ConfigError("--out needs a PATH where there is no CONFIG")
    target = Path(arguments.out) if arguments.out else default_path(arguments.config, "tuned", "--out")
    config = load_config(LabelConfig, arguments.config, arguments.overrides)
    labels = check_models(config.models)
    if arguments.model is not None and arguments.model not in labels:
        raise ConfigError(f"no model {arguments.model!r} in the config; there are {', '.join(labels)}")
    model = labels.index(arguments.model) if arguments.model else 0
    console = PrintableConsole(soft_wrap=True, stderr=True)
    if len(labels) > 1:
        console.print(f"tuning {labels[model]}; {' and '.join(SHARED_AXES)} are of all models and stay as they are")
        axes = [axis for axis in axes if axis not in SHARED_AXES]

    def say(setting: Setting, outcome: Outcome) -> None:
        text = f"{outcome.seconds_per_image * 1e3:.2f} ms an image" if isinstance(outcome, Timed) else "failed"
        console.print(f"  {setting.name}: {text}")

    found = tune(config, model, axes, arguments, say)
    out = PrintableConsole(soft_wrap=True)
    if arguments.json:
        print(json.dumps({"model": labels[model], **found.plain()}, indent=1))
    else:
        for line in lines(found):
            out.print(line)
    text = "{}" if arguments.config is None else read_bytes(arguments.config, max_bytes=MAX_YAML_BYTES).decode()
    overrides = [*arguments.overrides, *found.best.overrides(model)]
    copy, left_out = applied(text, overrides, dict(found.best.resources), "tune")
    write_copy(arguments.config, target, copy, "--out")
    again = "".join(f" {name}=..." for name in left_out)
    print(f"wrote {target}: maskmill label {target}{again}", file=sys.stderr)
    return 0


def tune(
    config: LabelConfig,
    model: int,
    axes: Sequence[str],
    arguments: argparse.Namespace,
    say: Callable[[Setting, Outcome], None],
) -> Search:
    """Search in a process of its own with a worker's environment. Raises ConfigError where fp32 does not work."""
    units = choose_units(plan_table(open_source(config.source).plan()), arguments.units, arguments.seed)
    if not units:
        raise ConfigError("source: expected images, got none")
    ends = time.monotonic() + arguments.seconds
    with (
        _environment(),
        Apart(config, model, units, images=arguments.images, seed=arguments.seed, limit_s=arguments.limit) as measuring,
    ):

        def measure(setting: Setting) -> Outcome:
            outcome = measuring.measure(setting)
            say(setting, outcome)
            return outcome

        found = search(
            measuring.start,
            measuring.context(),
            measure,
            axes=axes,
            tolerance=arguments.tolerance,
            budget_of=measuring.budget,
            time_left=lambda: time.monotonic() < ends,
        )
    if isinstance(found, Failed):
        raise StorageError(f"the model does not work in fp32: {found.reason}")
    return found


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What a worker of a run has, for processes that are started inside."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT["env_vars"])
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    sys.exit(main())
