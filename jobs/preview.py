"""One PNG of images with their masks: `maskmill preview OUTPUT [--n 16] [--out FILE] [--model NAME]`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jobs.common import guarded
from pipeline.config import LabelConfig
from pipeline.configfile import load_config, load_overrides, source_from
from pipeline.errors import ConfigError
from pipeline.preview import contact_sheet, pick_rows
from pipeline.runfile import read_run
from pipeline.storage import open_fs
from pipeline.table import RowTable
from pipeline.taxonomy import build_taxonomy

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        "maskmill preview", description="write one PNG of images with their masks (and targets, where there are any)"
    )
    parser.add_argument("output", help="output.uri of the run")
    parser.add_argument("--n", type=int, default=16, help="images (default 16)")
    parser.add_argument("--out", default="preview.png", help="the PNG to write (default preview.png)")
    parser.add_argument("--model", help="label of the model (default: the first)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images")
    parser.add_argument("--config", help="the run's config, for the storage options that run.json does not keep")
    parser.add_argument(
        "overrides", nargs="*", help="source.storage.key=value, output.storage.key=value, source.uri=..."
    )
    arguments = parser.parse_args(argv)
    return guarded(lambda: _preview(arguments))


def _preview(arguments: argparse.Namespace) -> int:
    if arguments.n < 1:
        raise ConfigError(f"--n must be 1 or more, got {arguments.n}")
    storage: dict[str, Any]
    if arguments.config:
        config = load_config(LabelConfig, arguments.config, arguments.overrides)
        source, storage = config.source, config.output.storage
        run = read_run(arguments.output, storage)
    else:
        tree = load_overrides(arguments.overrides)
        storage = tree.get("output", {}).get("storage", {})
        run = read_run(arguments.output, storage)
        source = source_from({**run["config"]["source"], "storage": {}, **tree.get("source", {})})
    models = {model["label"]: model for model in run["models"]}
    model = models.get(arguments.model) if arguments.model else next(iter(models.values()))
    if model is None:
        raise ConfigError(f"no model {arguments.model!r} in {arguments.output}; there are {', '.join(models)}")
    table = RowTable.open(arguments.output, storage)
    rows = pick_rows(table, model["label"], model["version"], arguments.n, arguments.seed)
    if not rows:
        raise ConfigError(f"{arguments.output} has no labelled row of model {model['label']} yet")
    taxonomy = build_taxonomy(model["taxonomy"], "run.json")
    title = f"{model['label']} {model['version']}: {len(rows)} images, taxonomy {taxonomy.name}"
    sheet = contact_sheet(source, rows, taxonomy, title)
    fs, path = open_fs(arguments.out)
    fs.makedirs(fs._parent(path), exist_ok=True)
    with fs.open(path, "wb") as file:
        sheet.save(file, "PNG")
    print(f"{arguments.out}: {len(rows)} images, {sheet.width}x{sheet.height} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
