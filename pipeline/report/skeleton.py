"""One self-contained HTML page from sections of a few kinds of blocks: what the report and the comparison share.

The page loads nothing. Its content security policy names its own style sheet and script by their hash, so that markup
that came through with the data could neither run nor load anything, even if it were not escaped; it is escaped as well.
Control characters and bidirectional overrides are shown as their codes: a name reads as what it is.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.printable import printable
from pipeline.report.gallery import Picture

__all__ = [
    "Beside",
    "Block",
    "Cell",
    "Chart",
    "Charts",
    "Code",
    "Column",
    "Details",
    "Facts",
    "Gallery",
    "Prose",
    "Row",
    "Section",
    "Table",
    "render",
]


@dataclass(frozen=True, slots=True)
class Cell:
    """Text of a table's cell, with a bar beside it. value: what its column is sorted by, None at the end."""

    text: str
    value: float | str | None = None
    chart: Markup | None = None
    title: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """kind: text (left), number (right), bar (a number and its bar). title: a tooltip."""

    name: str
    kind: str = "number"
    title: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """dim: the row has no evidence. swatch: before the text of the first cell."""

    cells: tuple[Cell, ...]
    dim: bool = False
    swatch: Markup | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table that can be sorted, unless `still`. The first column heads its rows; the script folds long ones."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    still: bool = False
    block: str = field(default="table", init=False)


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its heading. keys: (what, class) of its colours. note: what to read from it."""

    title: str
    svg: Markup
    note: str = ""
    keys: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Charts:
    """Charts beside each other where there is room; `wide` ones have the whole width and scroll in it."""

    charts: tuple[Chart, ...]
    wide: bool = False
    block: str = field(default="charts", init=False)


@dataclass(frozen=True, slots=True)
class Prose:
    """A paragraph. heading: above it."""

    text: str
    heading: str = ""
    block: str = field(default="prose", init=False)


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values."""

    pairs: tuple[tuple[str, str], ...]
    block: str = field(default="facts", init=False)


@dataclass(frozen=True, slots=True)
class Code:
    """Text as it is."""

    text: str
    block: str = field(default="code", init=False)


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures, each with its value as text. keys: (what, class) of the error panels' colours. swatches: (name, swatch)
    of the classes in the others."""

    pictures: tuple[tuple[Picture, str], ...]
    keys: tuple[tuple[str, str], ...] = ()
    swatches: tuple[tuple[str, Markup], ...] = ()
    block: str = field(default="gallery", init=False)


@dataclass(frozen=True, slots=True)
class Beside:
    """Blocks side by side where there is room: the first as wide as it has to be, the others in the rest."""

    blocks: "tuple[Block, ...]"
    block: str = field(default="beside", init=False)


@dataclass(frozen=True, slots=True)
class Details:
    """Blocks that are shown on demand."""

    summary: str
    blocks: "tuple[Block, ...]"
    block: str = field(default="details", init=False)


Block = Table | Charts | Prose | Facts | Code | Gallery | Beside | Details


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. name: in its address and its entry of the contents. lead: what it is about, one sentence."""

    name: str
    title: str
    blocks: tuple[Block, ...]
    lead: str = ""


def render(
    template: str, *, title: str, sections: Sequence[Section], notes: Sequence[tuple[str, str]], **more: Any
) -> str:
    """The page. template: one that extends base.html.j2 with its own header, for which `more` is. notes: how figures
    are defined, as (name, text), at the end."""
    environment = Environment(
        loader=PackageLoader("pipeline.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    style, script = (_asset(name) for name in ("style.css", "script.js"))
    page = environment.get_template(template).render(
        title=title,
        sections=[section for section in sections if section.blocks],
        notes=notes,
        style=style,
        script=script,
        policy="; ".join(
            (
                "default-src 'none'",
                f"style-src '{_digest(style)}'",
                f"script-src '{_digest(script)}'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
            )
        ),
        **more,
    )
    # Last of all, so that no text can have come past it; what takes their place needs no escaping in HTML.
    return printable(page, keep="\t\n")


def _asset(name: str) -> str:
    return (resources.files("pipeline.report") / "templates" / name).read_text("utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"
