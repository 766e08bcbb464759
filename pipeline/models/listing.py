"""The registry as a table: what each model is, how large, from where, and under which licence."""

import inspect
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame, ModelSpec, Prompts
from pipeline.taxonomy import load_taxonomy

__all__ = [
    "NUMBERS",
    "TIMED_SIZE",
    "Listed",
    "as_text",
    "listed",
    "markdown_rows",
    "parameters",
    "plain",
    "seconds_per_image",
]

# Rows and columns.
TIMED_SIZE = (192, 256)
TIMED_IMAGES = 3
# What a first pass has to warm up is nothing beside this.
SLOW_S = 5.0
NUMBERS = ("M parameters", "s per image", "time")
# Pages give times as multiples of this model's, from one run: seconds are those of one machine.
TIME_UNIT = "unet_small"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One row. parameters_m: millions, None without the extra. seconds: per image, None: unmeasured."""

    name: str
    task: str
    taxonomy: str
    parameters_m: float | None
    weights: tuple[str, ...]
    license: str
    commercial: bool
    extra: str
    paper: str
    seconds: float | None = None


def listed(specs: Iterable[ModelSpec] = MODELS.values(), *, timed: bool = False) -> list[Listed]:
    """A row for each model. Nothing is downloaded, and nothing allocated but by what cannot be built without memory."""
    rows = []
    for spec in specs:
        try:
            count = parameters(spec)
        except ConfigError:  # without its extra
            count = None
        rows.append(
            Listed(
                name=spec.name,
                task=spec.task,
                taxonomy=spec.taxonomy,
                parameters_m=None if count is None else count / 1e6,
                weights=("none", *spec.weights),
                license=spec.license,
                commercial=spec.commercial,
                extra=spec.extra,
                paper=spec.paper,
                seconds=seconds_per_image(spec) if timed and count is not None else None,
            )
        )
    return rows


def parameters(spec: ModelSpec) -> int:
    """Parameters of a model with its own label space and options. Raises ConfigError without its extra."""
    try:
        with torch.device("meta"):  # shapes without memory
            module = _build(spec)
    except (RuntimeError, NotImplementedError):  # it reads values while it is built
        module = _build(spec)
    return sum(parameter.numel() for parameter in module.parameters())


def _build(spec: ModelSpec) -> nn.Module:
    known = inspect.signature(spec.build).parameters
    options = {name: value for name, value in (spec.options or {}).items() if name in known}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spec.module(load_taxonomy(spec.taxonomy), options)


@torch.inference_mode()
def seconds_per_image(spec: ModelSpec, images: int = TIMED_IMAGES) -> float:
    """Mean time of the forward pass on one image of TIMED_SIZE and random weights, after one that is not counted
    unless it takes SLOW_S.

    On the CPU, one image at a time, padded as the model wants it but not resized, with a box to look at for models that
    ask for one. Processor time of all threads, which other work on the machine does not lengthen: of one thread (see
    `jobs/models.py`) it is the time. Raises ConfigError without its extra.
    """
    module = _build(spec).eval()
    height, width = TIMED_SIZE
    padded = spec.preprocess.padded(height, width)
    image_BCHW = torch.zeros(1, 3, *padded).to(memory_format=torch.channels_last)
    module = module.to(memory_format=torch.channels_last)
    frames = [Frame(height, width, height, width, Prompts(boxes=((8.0, 8.0, width / 2, height / 2),)))]
    started = time.process_time()
    spec.forward(module, image_BCHW, frames)
    first = time.process_time() - started
    if first > SLOW_S:
        return first
    started = time.process_time()
    for _ in range(images):
        spec.forward(module, image_BCHW, frames)
    return (time.process_time() - started) / images


def as_text(row: Listed, *, mark: str = "") -> dict[str, str]:
    """The row's cells by column. mark: around names and addresses (Markdown's backtick)."""
    cells = {
        "name": f"{mark}{row.name}{mark}",
        "task": row.task,
        "taxonomy": row.taxonomy,
        "M parameters": "–" if row.parameters_m is None else f"{row.parameters_m:.1f}",
        "weights": ", ".join(f"{mark}{weights}{mark}" for weights in row.weights),
        "licence": row.license + ("" if row.commercial or "non-commercial" in row.license else " (non-commercial)"),
        "extra": row.extra,
        "paper": row.paper,
    }
    if row.seconds is not None:
        cells["s per image"] = f"{row.seconds:.3f}"
    return cells


def markdown_rows(rows: Sequence[Listed]) -> list[str]:
    """The lines of a Markdown table. Times are multiples of TIME_UNIT's, left out where that was not measured."""
    unit = next((row.seconds for row in rows if row.name == TIME_UNIT), None)
    cells = [as_text(replace(row, seconds=None), mark="`") for row in rows]
    if unit:
        for row, cell in zip(rows, cells, strict=True):
            cell["time"] = "–" if row.seconds is None else f"{row.seconds / unit:.1f}"
    columns = max((list(row) for row in cells), key=len, default=[])
    rules = ["--:" if name in NUMBERS else "---" for name in columns]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(rules) + "|"]
    return lines + ["| " + " | ".join(row.get(name, "–") for name in columns) + " |" for row in cells]


def plain(row: Listed) -> dict[str, object]:
    """The row as JSON has it."""
    return asdict(row)
