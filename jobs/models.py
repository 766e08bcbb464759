"""List the registry: `maskmill models`."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Literal

import torch
from rich.table import Table

from jobs.common import guarded
from pipeline.models.listing import NUMBERS, TIMED_SIZE, Listed, as_text, listed, markdown_rows, plain
from pipeline.models.registry import MODELS, find_model
from pipeline.printable import PrintableConsole

__all__ = ["main", "page"]

# Into a file or a pipe, nothing is folded.
PIPE_WIDTH = 300
INTRODUCTION = """\
# Models

`maskmill models --markdown --time > docs/models.md` writes this page from the registry (`pipeline/models/registry.py`).

A model goes into a config as `models: [{name: NAME, weights: ADDRESS}]` (`maskmill label`) or `model:`
(`maskmill train`). The licence is that of the published weights, or of the code where there are none; the jobs warn
where it forbids commercial use. The time is the processor time of a forward pass over one 256x192 image, padded but not
resized, with one box as its prompt, on one thread with random weights (which may find hundreds of objects), as a
multiple of `unet_small`'s: rough, and `–` where it was not measured. A model with an extra needs
`pip install "maskmill[EXTRA]"`. A model of your own is `spec: "package.module:SPEC"`, a `ModelSpec`.
"""
# One row of a Markdown table is one line.
# ruff: noqa: E501
WEIGHTS = """\
## Addresses of weights

| address | what it names |
|---|---|
| `none` | random weights, from the seed |
| `bundled:NAME` | a checkpoint that comes with maskmill |
| `torchvision:ENUM` | torchvision's weights, such as `torchvision:VGG16_Weights.IMAGENET1K_V1` |
| `hf:REPO[@REVISION][:FILE]` | a file of the Hugging Face Hub (extra `hf`): `model.safetensors`, or the parts that its index lists; another file where one is named |
| `timm:NAME[.TAG][@REVISION]` | timm's weights (extra `smp`), for a backbone: `partial_weights: true` |
| a path or URI | a checkpoint folder, or a `.safetensors`, `.pt`, `.pth` or `.bin` file; local, `s3://`, `https://`, `gs://`, ... |

- Only tensors are read: safetensors, and torch files with `weights_only=True`.
- An address of a file or folder may end in `#sha256=` and the 64 digits of the weights file. Another content is
  refused, and a copy that has it is used without asking the server.
- Files from elsewhere are kept in `~/.cache/maskmill/weights` (`MASKMILL_CACHE` names another folder than
  `~/.cache/maskmill`), one version of each address, and fetched anew when their size, etag or time of change differ.
  The Hub's files are kept in its own cache (`HF_HOME`), torchvision's in `TORCH_HOME`.
- `run.json` records the commit that an `hf:` or `timm:` address was read at.
- `MASKMILL_OFFLINE=1` (or `HF_HUB_OFFLINE=1`), set on the machines that load models: nothing is fetched. What is
  missing then is said with the path where a copy would be found.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        "maskmill models", description="List the models of the registry, their weights and licences."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as the page docs/models.md")
    form.add_argument("--json", action="store_true", help="as JSON")
    height, width = TIMED_SIZE
    parser.add_argument(
        "--time",
        action="store_true",
        help=f"measure seconds per image of {width} x {height} too: the forward pass with random weights on one thread",
    )
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as error:
        return int(error.code or 0)
    return guarded(lambda: _show(arguments))


def _show(arguments: argparse.Namespace) -> int:
    specs = [find_model(name) for name in arguments.names] or list(MODELS.values())
    if arguments.time:
        torch.set_num_threads(1)
    rows = listed(specs, timed=arguments.time)
    if arguments.json:
        print(json.dumps([plain(row) for row in rows], indent=2))
    elif arguments.markdown:
        print(page(rows), end="")
    else:
        _print(rows)
    return 0


def page(rows: Sequence[Listed]) -> str:
    """The content of docs/models.md."""
    return "\n".join((INTRODUCTION, *markdown_rows(rows), "", WEIGHTS))


def _print(rows: Sequence[Listed]) -> None:
    cells = [as_text(row) for row in rows]
    columns = max((list(row) for row in cells), key=len)
    table = Table(box=None, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in NUMBERS else "left"
        table.add_column(column, overflow="fold", no_wrap=column == "name", justify=justify)
    for row in cells:
        table.add_row(*(row.get(column, "–") for column in columns))
    PrintableConsole(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


if __name__ == "__main__":
    sys.exit(main())
