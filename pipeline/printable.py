"""Text of others made safe to show: no control character of it reaches a terminal or a page.

Names of files and messages of decoders come with the data. An escape sequence in one can move the cursor, write the
clipboard or fake a line; a bidirectional override makes a name read as another.
"""

import logging
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from pipeline.redaction import redact_text

__all__ = ["PlainFormatter", "PrintableConsole", "printable", "printable_log"]

# C0 and C1 controls, bidirectional marks and overrides, line and paragraph separators, lone surrogates.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# A stream of lines, as a job's log is: what lays them out stays, and so do colours (SGR).
UNSAFE_IN_LOG = re.compile("\x1b\\[[0-9;]{0,32}m|[\t\n\r]|" + UNSAFE.pattern)


def printable(text: str, keep: str = "") -> str:
    r"""Text for people: what is not to be printed is written as its escape, ESC as \x1b. keep: characters that stay."""
    return UNSAFE.sub(lambda match: match[0] if match[0] in keep else _escape(match), text)


def printable_log(text: str) -> str:
    """Lines of a log: as `printable`, but tabs, ends of lines and colours stay."""
    return UNSAFE_IN_LOG.sub(lambda match: match[0] if _is_layout(match[0]) else _escape(match), text)


def _is_layout(found: str) -> bool:
    return len(found) > 1 or found in "\t\n\r"


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


class PrintableConsole(Console):
    """A terminal on which only the console's own control sequences work. Nothing in a text is markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, keep="\n"), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            # Before it is laid out: what is escaped later would be cut to the width of what it was.
            renderable = renderable.copy()
            renderable.plain = printable(renderable.plain, keep="\n")
        return super().render(renderable, options)


class PlainFormatter(logging.Formatter):
    """Log records without credentials and control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_log(redact_text(super().format(record)))
