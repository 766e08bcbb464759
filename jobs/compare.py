"""Two runs over the same images: `maskmill compare A B`. Ray starts only where B has still to be held against A."""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from jobs.common import guarded
from jobs.evaluate import evaluate
from pipeline.config import EvaluateConfig
from pipeline.configfile import load_overrides, redacted
from pipeline.errors import ConfigError, RunError
from pipeline.printable import PrintableConsole, printable
from pipeline.report.compare.agreement import agreement_score, write_agreement
from pipeline.report.compare.agreement_page import render_agreement
from pipeline.report.compare.cells import run_names
from pipeline.report.compare.comparison import COMPARE_FILE, CompareOptions, write_comparison
from pipeline.report.compare.page import render_comparison
from pipeline.report.compare.pictures import agreement_pictures, change_pictures
from pipeline.report.compare.terminal import compare_tables
from pipeline.report.gallery import Picture
from pipeline.report.report import PAGE_FILE, encode
from pipeline.report.rows import ScoredTable, find_scored, open_predicted, open_scored
from pipeline.runfile import RUN_FILE, SCORES_FOLDER, read_run
from pipeline.storage import join, open_fs, storage_errors

__all__ = ["main"]

FOLDER = "_compare"
# Into a file or a pipe, nothing is folded.
PIPE_WIDTH = 240
SIDES = ("a", "b")
OF_A_SIDE = {"storage", "predictions"}
SECTIONS = ("a", "b", "storage", "source", "score", "workers", "ray_address")
Pictures = dict[str, list[Picture]]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        "maskmill compare",
        description="what differs between two runs over the same images: figures with paired intervals, classes, "
        "images; without targets, how far the two models agree",
    )
    parser.add_argument(
        "a", metavar="A", help="output.uri of a label run, or of an evaluation: what B is compared with"
    )
    parser.add_argument("b", metavar="B", help="the other one, or the same with another model")
    parser.add_argument(
        "--models", nargs=2, metavar=("A_LABEL", "B_LABEL"), help="which models, where there are several"
    )
    parser.add_argument(
        "--agreement", action="store_true", help="hold B against A even where both were scored against targets"
    )
    parser.add_argument("--out", help="folder of the comparison (default: _compare in B)")
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="replicates of the intervals (default 1000, 0: none)"
    )
    parser.add_argument(
        "--images", type=int, default=8, metavar="K", help="images that changed most, in each direction (default 8)"
    )
    parser.add_argument("--json", action="store_true", help="print the comparison itself, and nothing else")
    parser.add_argument("--no-page", action="store_true", help="no HTML page; the source is not read")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="storage.key=value of A, B and --out, or a.storage.... and b.storage....; source.storage.key=value, "
        "source.uri=..., a.predictions.... for the pictures; score.... and workers=N of an agreement",
    )
    arguments = parser.parse_intermixed_args(argv)
    return guarded(lambda: _compare(arguments))


def _compare(arguments: argparse.Namespace) -> int:
    for name in ("bootstrap", "images"):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name} must be 0 or more, got {getattr(arguments, name)}")
    tree = _overrides(arguments.overrides)
    general: dict[str, Any] = tree.get("storage", {})
    storage_a, storage_b = (tree.get(side, {}).get("storage", general) for side in SIDES)
    storage = general if arguments.out else storage_b
    label_a, label_b = arguments.models or (None, None)
    uri = str(arguments.out or join(arguments.b, FOLDER))
    options = CompareOptions(replicates=arguments.bootstrap, images=arguments.images)
    scored_a = [] if arguments.agreement else find_scored(arguments.a, storage_a, label_a)
    scored_b = [] if arguments.agreement else find_scored(arguments.b, storage_b, label_b)
    if scored_a and scored_b:
        a, b = _one(scored_a, "A"), _one(scored_b, "B")
        comparison = write_comparison(a, b, uri, storage, options)
        draw = functools.partial(change_pictures, comparison, a, b, *(_sources(tree, side) for side in SIDES))
        render, taxonomy = render_comparison, b.taxonomy
    else:
        lacking = [side.upper() for side, found in zip(SIDES, (scored_a, scored_b), strict=True) if not found]
        if not arguments.agreement:
            print(f"maskmill: no scores in {' and '.join(lacking)}; so B is held against A", file=sys.stderr)
        a = _one(open_predicted(arguments.a, storage_a, label_a), "A")
        b = _one(open_predicted(arguments.b, storage_b, label_b), "B")
        scored = _held_against(a, b, uri, storage, tree)
        comparison = write_agreement(a, b, scored, uri, storage, options)
        tables = {"source": {"storage": storage_a}, "predictions": {"storage": storage_b}}
        draw = functools.partial(agreement_pictures, comparison, a, scored, _sources(tree, "a"), tables)
        render, taxonomy = render_agreement, scored.taxonomy
    if not arguments.no_page:
        palette = {category.id: category.color for category in taxonomy.categories}
        _write_page(render(comparison, _pictures(draw), palette=palette), uri, storage)
    if arguments.json:
        print(encode(comparison), end="")
    else:
        _show(comparison, uri, page=not arguments.no_page)
    return 0


def _sources(overrides: Mapping[str, Any], side: str) -> dict[str, Any]:
    """What the pictures of one side are read with."""
    found = {name: value for name, value in overrides.items() if name == "source"}
    predictions = overrides.get(side, {}).get("predictions")
    return found | ({"predictions": predictions} if predictions else {})


def _pictures(draw: Callable[[], Pictures]) -> Pictures:
    """None where the source or the predictions cannot be read any more: the figures do not need them."""
    try:
        return draw()
    except RunError as error:
        print(printable(f"maskmill: the page has no pictures: {' '.join(str(error).split())}"), file=sys.stderr)
        return {}


def _write_page(page: str, uri: str, storage: Mapping[str, Any]) -> None:
    fs, folder = open_fs(uri, storage)
    with storage_errors(uri):
        fs.pipe_file(join(folder, PAGE_FILE), page.encode())


def _overrides(given: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = load_overrides(given)
    for name in (*SIDES, "storage", "source", "score"):
        if not isinstance(tree.get(name, {}), dict):
            raise ConfigError(f"expected {name}.key=value, got {name}={tree[name]}")
    unknown = sorted(tree.keys() - set(SECTIONS))
    unknown += [f"{side}.{name}" for side in SIDES for name in sorted(tree.get(side, {}).keys() - OF_A_SIDE)]
    if unknown:
        raise ConfigError(f"expected one of {', '.join(SECTIONS)} to be set, got {unknown[0]!r}")
    return tree


def _one(found: Sequence[ScoredTable], side: str) -> ScoredTable:
    if len(found) > 1:
        labels = ", ".join(one.model["label"] for one in found)
        raise ConfigError(f"{side}, {found[0].table.uri}, has the models {labels}; --models says which of A and of B")
    return found[0]


def _held_against(
    a: ScoredTable, b: ScoredTable, uri: str, storage: Mapping[str, Any], overrides: Mapping[str, Any]
) -> ScoredTable:
    """The scores of B with A as its target, made or finished where they are not there yet."""
    below = join(uri, SCORES_FOLDER)
    label_a, label_b = a.model["label"], b.model["label"]
    tree = {
        "source": {"format": "table", "uri": a.table.uri, "model": label_a, "storage": dict(a.table.storage)},
        "predictions": {
            **overrides.get("b", {}).get("predictions", {}),
            "uri": b.table.uri,
            "models": [label_b],
            "storage": dict(b.table.storage),
        },
        "output": {"uri": below, "storage": dict(storage)},
        "score": agreement_score(overrides.get("score", {}), a, b),
        **{name: overrides[name] for name in ("workers", "ray_address") if name in overrides},
    }
    try:
        config = EvaluateConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"the agreement cannot be scored: {' '.join(str(error).split())[:300]}") from error
    _check_own(below, storage, config)
    evaluate(config)
    return open_scored(below, storage, label_b)[0]


def _check_own(uri: str, storage: Mapping[str, Any], config: EvaluateConfig) -> None:
    """Raises ConfigError where the folder holds the scores of other things."""
    fs, path = open_fs(join(uri, RUN_FILE), storage)
    with storage_errors(uri):
        if not fs.exists(path):
            return
    there, here = read_run(uri, storage).get("config") or {}, redacted(config)
    for section, names in (("source", ("format", "uri", "model")), ("predictions", ("uri", "models"))):
        for name in names:
            if (there.get(section) or {}).get(name) != here[section][name]:
                raise ConfigError(
                    f"{uri} holds scores of something else: its {section}.{name} is "
                    f"{(there.get(section) or {}).get(name)!r}, not {here[section][name]!r}; give another --out"
                )


def _show(comparison: Mapping[str, Any], uri: str, *, page: bool) -> None:
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = PrintableConsole(width=width)
    names = run_names(comparison)
    for side, name in zip(SIDES, names, strict=True):
        run = comparison[side]["run"]
        console.print(f"{side.upper()}: {name}, run {run.get('run_id')}: {run.get('state')}", soft_wrap=True)
    for text in comparison["warnings"]:
        console.print(text, soft_wrap=True)
    for table in compare_tables(comparison):
        console.print()
        console.print(table)
    console.print()
    for what, name in (("comparison", COMPARE_FILE), *([("page", PAGE_FILE)] if page else [])):
        console.print(f"{what}: {join(uri, name)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
