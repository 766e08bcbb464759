"""How differences read, on the page and in the terminal: signed, shares in points, with a word for what they mean."""

from collections.abc import Mapping
from typing import Any

from pipeline.report.formats import DASH, FigureFormat, is_number

__all__ = ["CHANGES", "DIFFERENCE", "run_names", "signed", "signed_interval"]

Tree = Mapping[str, Any]

# A figure's `change`: an arrow, a word and the class of its colour. An arrow shows better or worse, not up or down.
CHANGES: Mapping[str | None, tuple[str, str, str]] = {
    "better": ("▲", "better", "tp"),
    "worse": ("▼", "worse", "fp"),
    "equal": ("=", "equal", "rest"),
    "unclear": ("·", "unclear", "rest"),
    None: ("", "", "rest"),
}
POINTS = 2
MINUS = "\N{MINUS SIGN}"
DIFFERENCE = f"B {MINUS} A"


def signed(shown: FigureFormat, value: float | None, *, unit: bool = False) -> str:
    """A difference with its sign: of shares in percentage points (+0.42), of others with four digits that count.

    What rounds to 0 and is not says so: <0.01 with its sign.
    """
    if not is_number(value):
        return DASH
    share = shown.kind == "share"
    size = abs(100 * value if share else value)
    digits = POINTS if share else 4 if size < 1 else 3 if size < 10 else 2
    text = f"{size:,.{digits}f}"
    if size > 0 and float(text.replace(",", "")) == 0:
        text = f"<{10**-digits:.{digits}f}"
    sign = "" if size == 0 else "+" if value > 0 else MINUS
    ending = " points" if share else f" {shown.unit}" if shown.unit else ""
    return f"{sign}{text}{ending if unit else ''}"


def signed_interval(shown: FigureFormat, bounds: list[float] | None) -> str:
    """`+0.12 to +0.72`, an en dash without one."""
    return DASH if bounds is None else f"{signed(shown, bounds[0])} to {signed(shown, bounds[1])}"


def run_names(comparison: Tree) -> tuple[str, str]:
    """What A and B are called: their labels, with their versions where these are the same."""
    labels = [str(comparison[side]["model"]["label"]) for side in ("a", "b")]
    if labels[0] == labels[1]:
        versions = [str(comparison[side]["model"].get("version", "")) for side in ("a", "b")]
        labels = [f"{label} {version}".strip() for label, version in zip(labels, versions, strict=True)]
    return labels[0], labels[1]
