"""Text of others in XML: escaped, and without the characters that XML 1.0 has no place for."""

from xml.sax.saxutils import escape, quoteattr

__all__ = ["attributes", "text"]


def text(value: object) -> str:
    """The content of an element."""
    return escape(_printable(str(value)))


def attributes(**values: object) -> str:
    """Attributes of an element, quoted."""
    return " ".join(f"{name}={quoteattr(_printable(str(value)))}" for name, value in values.items())


def _printable(value: str) -> str:
    return "".join(letter if letter.isprintable() else "_" for letter in value)
