"""Path templates such as `{city}/{id}.png`: what a path says about its image, and where what belongs to it lies."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import fsspec

from pipeline.errors import ConfigError
from pipeline.sources.objects import Wanted, list_objects
from pipeline.storage import Entry, relative

__all__ = ["ALWAYS", "Template", "check_template", "is_absolute", "path_captures", "path_pattern"]

CAPTURE = re.compile(r"\{([^{}]*)\}")
# What every path has, whatever the template.
ALWAYS = ("dir", "stem", "ext")


def path_pattern(template: str | None, where: str) -> re.Pattern[str] | None:
    """The expression of a path template; a capture is one part of a path, and the same text wherever it is repeated.

    Raises ConfigError that begins with `where`.
    """
    if template is None:
        return None
    if "{" in (rest := CAPTURE.sub("", template)) or "}" in rest:
        raise ConfigError(f"{where}: {template!r} has an unbalanced brace")
    text = ""
    seen: set[str] = set()
    for index, part in enumerate(CAPTURE.split(template)):
        if index % 2 == 0:
            text += re.escape(part)
        elif part in seen:
            text += f"(?P={part})"
        elif part.isidentifier() and part.isascii():
            seen.add(part)
            text += f"(?P<{part}>[^/]+)"
        else:
            raise ConfigError(f"{where}: {{{part}}} in {template!r} is no name of a capture")
    return re.compile(text)


def path_captures(pattern: re.Pattern[str] | None, path: str) -> dict[str, str]:
    """What `path` says: ALWAYS, and the captures of the pattern where it matches."""
    folder, _, base = path.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    captures = {"dir": folder, "stem": stem if dot else base, "ext": extension if dot else ""}
    match = pattern.fullmatch(path) if pattern else None
    return captures | (match.groupdict() if match else {})


def check_template(template: str, known: Collection[str], where: str) -> None:
    """Raises ConfigError that begins with `where` for a capture that is not `known`."""
    unknown = [name for name in CAPTURE.findall(template) if name not in known]
    if unknown or "{" in CAPTURE.sub("", template):
        what = f"captures {{{unknown[0]}}}" if unknown else "has an unbalanced brace"
        raise ConfigError(f"{where}: {template!r} {what}; known captures: {', '.join(sorted(known))}")


def is_absolute(template: str) -> bool:
    """Whether a template says by itself where it is, rather than below some folder."""
    return "://" in template or template.startswith("/")


@dataclass(frozen=True)
class Template:
    """A place on a file system for given captures. path: absolute, with the captures in braces.

    The template is the user's own and may lead anywhere; captures come with the data and may not.
    """

    fs: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def below(cls, fs: fsspec.AbstractFileSystem, root: str, template: str) -> "Template":
        """A template relative to the folder `root`, which it may leave with `../`."""
        while template.startswith("../"):
            template, root = template[3:], root.rpartition("/")[0]
        return cls(fs, f"{root}/{template}")

    @property
    def folder(self) -> str:
        """The folder that all its paths have in common."""
        return _clean(self.path.partition("{")[0].rpartition("/")[0]) or "/"

    def wanted(self, captures: Mapping[str, str], size_bytes: int | None = None) -> Wanted | None:
        """The object for these captures, None where they lack one or would lead elsewhere."""
        # A key of object storage may hold "..", which must not lead elsewhere; a path of a file system cannot.
        if any(".." in value.split("/") for value in captures.values()):
            return None
        if any(name not in captures for name in CAPTURE.findall(self.path)):
            return None
        path = CAPTURE.sub(lambda match: captures[match[1]], self.path)
        return Wanted(self.fs, _clean(path), size_bytes)

    def name(self, wanted: Wanted) -> str:
        """What to call one of its objects: the path below `folder`, as text for any table."""
        return relative(self.folder, wanted.path)

    def listing(self) -> dict[str, Entry] | None:
        """What there is of its shape, by path; None where that is not for free (see `list_objects`)."""
        shape = _shape(self.path)
        found = None if shape is None else list_objects(self.fs, self.folder)
        if found is None or shape is None:
            return None
        return {path: entry for path, entry in found.items() if shape.fullmatch(path)}


def _shape(template: str) -> re.Pattern[str] | None:
    """The expression of all paths that a template may give; None where it goes up again behind a capture."""
    fixed, brace, rest = template.partition("{")
    rest = brace + rest
    if ".." in rest.split("/"):
        return None
    parts = CAPTURE.split(f"{_clean(fixed)}{'/' if fixed.endswith('/') else ''}" + re.sub("//+", "/", rest))
    text = re.escape(parts[0])
    groups: dict[str, int] = {}
    for name, literal in zip(parts[1::2], parts[2::2], strict=True):
        if name == "dir" and literal.startswith("/"):
            # It may be several parts of a path or none at all, and then its slash is gone too.
            text, literal = text + "(?:.+/)?", literal[1:]
        elif name in groups:
            text += rf"(?:\{groups[name]})"
        else:
            groups[name] = len(groups) + 1
            text += {"dir": "(.*)", "ext": "([^/]*)"}.get(name, "([^/]+)")
        text += re.escape(literal)
    return re.compile(text)


def _clean(path: str) -> str:
    """Without empty parts and with `name/..` taken out, as the user's template may have them; `//` of URIs stays."""
    head, mark, rest = path.rpartition("://")
    parts: list[str] = []
    for part in rest.split("/"):
        if part == ".." and parts and parts[-1] not in {"", ".."}:
            parts.pop()
        elif part not in {"", "."} or not parts:
            parts.append(part)
    return head + mark + "/".join(parts)
