"""Benchmarks as Markdown, and the machine that they ran on."""

import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.bench.cells import ARMS
from pipeline.bench.figures import OURS, Arm, Cell, Row, rows_of
from pipeline.runfile import code_version

__all__ = ["machine", "markdown"]

PEER_PACKAGES = ("daft", "transformers", "torchao")
COLUMNS = ("", "images/s", "of the limit", "x maskmill", "whole command", "x maskmill", "first row", "the same rows")


def machine() -> dict[str, Any]:
    """The processor, its cores that are used here, memory, accelerators, and versions."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = code_version()
    for name in PEER_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "system": platform.platform(),
        "versions": versions,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(cells: Sequence[Cell], about: dict[str, Any], date: str, command: str) -> str:
    """Tables with what stands below each, ready for a page."""
    gpus = ", ".join(about["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    lines = [
        f"{date}, {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, {gpus}; {versions}.",
        "",
        f"`{command}`",
        "",
    ]
    for cell in cells:
        lines += [*_cell(cell), ""]
    return "\n".join(lines).rstrip() + "\n"


def _cell(cell: Cell) -> Iterator[str]:
    size = cell.size_bytes / 1e6
    yield f"### {cell.name}: {cell.model} ({cell.task}), {cell.images} images of corpus {cell.corpus} ({size:.1f} MB)"
    yield ""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|---" + "|---:" * (len(COLUMNS) - 1) + "|"
    rows = rows_of(cell)
    for row in rows:
        arm = cell.arm(row.name)
        yield "| " + " | ".join(_values(row, arm)) + " |"
    yield ""
    runs = max((arm.figures.runs for arm in cell.arms if arm.figures), default=0)
    yield f"Medians of {runs} run{'s' if runs != 1 else ''} that took turns."
    ahead = [f"{ARMS[row.name].title} ({', '.join(row.ahead)})" for row in rows if row.ahead]
    peers = [row for row in rows if row.wall_s is not None and row.name != OURS]
    if ahead:
        yield f"Ahead of maskmill: {'; '.join(ahead)}."
    elif peers:
        yield "No peer is ahead of maskmill."
    for arm in cell.arms:
        yield from _notes(arm)


def _values(row: Row, arm: Arm | None) -> tuple[str, ...]:
    name = ARMS[row.name].title if row.name in ARMS else row.name
    return (
        f"**{name}**" if row.name == OURS else name,
        _number(row.images_per_s, ".2f"),
        _number(row.of_limit, ".2f"),
        _number(row.rate_to_ours, ".2f"),
        _number(row.wall_s, ".1f", " s"),
        _number(row.wall_to_ours, ".2f"),
        _number(row.first_row_s, ".1f", " s"),
        _same(arm),
    )


def _same(arm: Arm | None) -> str:
    if arm is None or arm.agreement is None:
        return ""
    found = arm.agreement
    wrong = [f"{found[name]} {name}" for name in ("missing", "strange", "twice", "unlike") if found[name]]
    if wrong:
        return ", ".join(wrong)
    if found["equal"] == found["images"]:
        return "all equal"
    figures = ", ".join(f"{name} {value:.4f}" for name, value in found["figures"].items() if name != "pixel_accuracy")
    return f"{found['equal']}/{found['images']} equal, {figures}"


def _notes(arm: Arm) -> Iterator[str]:
    title = ARMS[arm.name].title if arm.name in ARMS else arm.name
    if arm.problem:
        yield f"- {title}: {arm.problem}"
    elif arm.leaves_out and arm.figures is not None and arm.figures.wall_s is not None:
        yield f"- {title} leaves out: {arm.leaves_out}."


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
