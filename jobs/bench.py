"""How fast labelling is beside its limit and beside other tools: `maskmill bench [--peers] [--quick]`."""

import argparse
import contextlib
import importlib.util
import json
import math
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.common import guarded
from jobs.driver import signals_interrupt
from pipeline.bench.cells import ARMS, CELLS, FREE_ARMS, QUICK_CELLS, CellSpec, find_cell
from pipeline.bench.chart import chart
from pipeline.bench.corpora import Corpus, make_corpus
from pipeline.bench.figures import OURS, Arm, Cell, Run, arms_of, turns
from pipeline.bench.launch import launch
from pipeline.bench.outputs import compare, our_rows, peer_rows
from pipeline.bench.peers_transformers import refusal
from pipeline.bench.store import served
from pipeline.bench.table import machine, markdown
from pipeline.bench.worker import Task, one_model
from pipeline.config import LabelConfig
from pipeline.dataflow.cluster import ENVIRONMENT
from pipeline.errors import ConfigError, MaskmillError
from pipeline.models.load import LoadedModel
from pipeline.preflight.memory import core_count
from pipeline.printable import PrintableConsole
from pipeline.stages.predict import choose_device, default_batch_pixels

__all__ = ["bench", "main"]

QUICK_IMAGES = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        "maskmill bench",
        description="time maskmill label beside its limit, and beside other tools that do the same, in turns",
        epilog="cells: "
        + "; ".join(f"{cell.name}: {cell.model['name']} on {cell.corpus}" for cell in CELLS.values())
        + '. The peers need: pip install "maskmill[peers]"',
    )
    parser.add_argument(
        "--peers", action="store_true", help="a PyTorch loop, Ray Data, Daft, a transformers pipeline too"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one small cell, one round: about two minutes on two cores"
    )
    parser.add_argument("--cells", metavar="NAMES", help="cells by name or as CORPUS:MODEL, separated by commas (all)")
    parser.add_argument("--arms", metavar="NAMES", help=f"of {','.join(ARMS)} (all that --peers or its absence says)")
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each arm (3; with --quick 1)")
    parser.add_argument("--images", type=int, metavar="N", help="images of each corpus (each cell's own number)")
    parser.add_argument("--shards", type=int, default=6, metavar="N", help="files of each corpus (6)")
    parser.add_argument("--seed", type=int, default=0, help="of the corpora and of random weights (0)")
    parser.add_argument("--latency-ms", type=float, default=30.0, metavar="MS", help="of the s3 corpus's server (30)")
    parser.add_argument("--batch-pixels", type=int, metavar="N", help="padded pixels of a batch (what label takes)")
    parser.add_argument("--limit", type=float, default=600.0, metavar="S", help="seconds of one run at most (600)")
    parser.add_argument(
        "--corpora", metavar="FOLDER", help="where corpora are kept for the next time (a temporary one)"
    )
    parser.add_argument("--out", default="bench", metavar="FOLDER", help="bench.json, bench.md and bench.svg go there")
    parser.add_argument("--json", action="store_true", help="print bench.json instead of the tables")
    arguments = parser.parse_args(given)
    arguments.command = shlex.join(["maskmill", "bench", *given])

    def body() -> int:
        with signals_interrupt():  # so that what was started ends with it
            return bench(arguments)

    return guarded(body)


def bench(arguments: argparse.Namespace) -> int:
    """Measure the cells that are asked for, one after the other; what is done is written after each."""
    for name in ("images", "shards", "rounds", "limit", "batch_pixels"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if not 0 <= arguments.latency_ms < math.inf:
        raise ConfigError(f"--latency-ms must be 0 or more, got {arguments.latency_ms}")
    names = arguments.cells.split(",") if arguments.cells else QUICK_CELLS if arguments.quick else tuple(CELLS)
    specs = [find_cell(name) for name in names]
    chosen = arguments.arms.split(",") if arguments.arms else list(ARMS if arguments.peers else FREE_ARMS)
    unknown = [name for name in chosen if name not in ARMS]
    if unknown:
        raise ConfigError(f"--arms must be of {', '.join(ARMS)}, got {unknown[0]!r}")
    # The others are held against it.
    arms = [name for name in ARMS if name in chosen or name == OURS]
    console = PrintableConsole(stderr=True, soft_wrap=True)
    about = machine()
    date = datetime.now(UTC).date().isoformat()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory(prefix="maskmill-bench-") as scratch:
        for spec in specs:
            corpora = Path(arguments.corpora) if arguments.corpora else Path(scratch) / "corpora"
            cells.append(_cell(spec, arms, arguments, corpora.absolute(), Path(scratch) / "runs", console))
            tree = {
                "date": date,
                "command": arguments.command,
                "machine": about,
                "cells": [cell.plain() for cell in cells],
            }
            text = markdown(cells, about, date, arguments.command)
            (out / "bench.json").write_text(json.dumps(tree, indent=1, default=str))
            (out / "bench.md").write_text(text)
            (out / "bench.svg").write_text(chart(cells))
    print(json.dumps(tree, indent=1, default=str) if arguments.json else text)
    console.print(f"wrote {out / 'bench.json'}, bench.md, bench.svg")
    return 0


def _cell(
    spec: CellSpec,
    arms: Sequence[str],
    arguments: argparse.Namespace,
    corpora: Path,
    folder: Path,
    console: PrintableConsole,
) -> Cell:
    images = arguments.images or (min(QUICK_IMAGES, spec.images) if arguments.quick else spec.images)
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    console.print(f"{spec.name}: making {images} images")
    corpus = make_corpus(spec.corpus, corpora, images=images, shards=arguments.shards, seed=arguments.seed)
    files = [path for path in corpus.folder.iterdir() if path.suffix != ".part"]
    size_bytes = sum(len(path.read_bytes()) for path in files)  # and they are in memory from now on, for every arm
    with _source(corpus, arguments.latency_ms / 1e3) as source:
        config = _config(spec, source, folder, images, arguments)
        model = one_model(config)
        able, left_out = _able(arms, model)
        task = Task(
            config=config,
            preprocess=model.preprocess,
            batch_images=_batch_images(config, model),
        )
        runs: list[Run] = []
        agreements: dict[str, Mapping[str, Any]] = {}
        for number, arm in turns(able, rounds):
            shutil.rmtree(folder / arm, ignore_errors=True)
            output = config.output.model_copy(update={"uri": str(folder / arm / "output")})
            given = Task(
                config=config.model_copy(update={"output": output}),
                preprocess=task.preprocess,
                batch_images=task.batch_images,
            )
            run = launch(arm, given, folder / arm, ENVIRONMENT["env_vars"], arguments.limit)
            runs.append(run)
            console.print(f"{spec.name} {number + 1}/{rounds} {arm}: {_said(run)}")
            if number == 0 and arm == able[-1]:
                agreements = _agreements(able, runs, folder, model)
    shutil.rmtree(folder, ignore_errors=True)
    leaves_out = {name: ARMS[name].leaves_out for name in ARMS}
    found = {arm.name: arm for arm in arms_of(able, runs, leaves_out, agreements)}
    return Cell(
        name=spec.name,
        corpus=spec.corpus,
        model=model.label,
        task=model.spec.task,
        images=images,
        size_bytes=size_bytes,
        arms=tuple(found.get(name) or Arm(name=name, problem=left_out[name]) for name in arms),
        runs=tuple(runs),
    )


@contextlib.contextmanager
def _source(corpus: Corpus, latency_s: float) -> Iterator[dict[str, Any]]:
    if corpus.kind != "s3":
        yield corpus.source
        return
    with served(corpus.folder, latency_s) as place:
        yield {**corpus.source, **place}


def _config(
    spec: CellSpec, source: Mapping[str, Any], folder: Path, images: int, arguments: argparse.Namespace
) -> LabelConfig:
    """What `maskmill label` is given. Files hold as many rows as a shard does, for all alike."""
    return LabelConfig.model_validate(
        {
            "source": dict(source),
            "models": [dict(spec.model)],
            "output": {"uri": str(folder), "rows_per_file": math.ceil(images / arguments.shards)},
            "score": None,
            "seed": arguments.seed,
            "resources": {
                "workers": 1,
                "torch_threads": core_count(),
                "batch_pixels": arguments.batch_pixels or default_batch_pixels(choose_device()),
            },
        }
    )


def _batch_images(config: LabelConfig, model: LoadedModel) -> int:
    """Images of a batch for those who count rows: as many of COCO's size as fit the budget of pixels."""
    height, width = model.preprocess.padded(*model.preprocess.size(480, 640))
    pixels = config.resources.batch_pixels
    return max(1, (pixels if isinstance(pixels, int) else 0) // (height * width))


def _able(arms: Sequence[str], model: LoadedModel) -> tuple[list[str], dict[str, str]]:
    """Arms that can take part, and why the others cannot."""
    able, left_out = [], {}
    for name in arms:
        module = ARMS[name].module
        if module and importlib.util.find_spec(module) is None:
            left_out[name] = 'not installed; pip install "maskmill[peers]"'
        elif name == "transformers" and (reason := refusal(model)):
            left_out[name] = reason
        else:
            able.append(name)
    return able, left_out


def _agreements(
    arms: Sequence[str], runs: Sequence[Run], folder: Path, model: LoadedModel
) -> dict[str, Mapping[str, Any]]:
    """What each peer's first run left, held against maskmill's."""
    ended = {run.arm for run in runs if not run.problem}
    if OURS not in ended:
        return {}
    ours = {row["key"]: row for row in our_rows(folder / OURS / "output")}
    found: dict[str, Mapping[str, Any]] = {}
    for arm in arms:
        if arm != OURS and ARMS[arm].rows and arm in ended:
            with contextlib.suppress(MaskmillError):
                found[arm] = compare(ours, peer_rows(folder / arm / "output"), model.spec.task, model.taxonomy)
    return found


def _said(run: Run) -> str:
    if run.problem:
        return run.problem
    rate = "" if run.images_per_s is None else f"{run.images_per_s:.2f} images/s"
    return rate if run.wall_s is None else f"{rate}, {run.wall_s:.1f} s in all, first row after {run.first_row_s:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
