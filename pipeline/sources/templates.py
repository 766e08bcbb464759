"""Path templates such as `{city}/{id}.png`: what a path says about its image, and where what belongs to it lies."""

import functools
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


@dataclass(frozen=True)
class PathPattern:
    """What a path template captures, with work in proportion to the path, whatever its names are.

    A regular expression of several captures in one name tries every way to share out the name: a listing could hold
    names that take it hours. Here each capture ends where the text behind it stands last, which is what the expression
    finds too. expression: for templates that repeat a part of a name, where one end depends on the other.
    """

    names: tuple[str, ...]
    segments: tuple[str, ...]
    expression: re.Pattern[str] | None = None

    def captures(self, path: str) -> dict[str, str] | None:
        """What `path` says by name; None where it has another shape."""
        if self.expression is not None:
            match = self.expression.fullmatch(path)
            return match.groupdict() if match else None
        parts = path.split("/")
        if len(parts) != len(self.segments):
            return None
        found: dict[str, str] = {}
        mixed: list[tuple[str, str]] = []
        for segment, part in zip(self.segments, parts, strict=True):
            whole = CAPTURE.fullmatch(segment)
            if whole is None:
                mixed.append((segment, part))
            elif not part or found.setdefault(whole[1], part) != part:
                return None
        for segment, part in mixed:
            known = tuple((name, found[name]) for name in CAPTURE.findall(segment) if name in found)
            match = _backwards(segment, known).fullmatch(part[::-1])
            if match is None:
                return None
            found |= {name: value[::-1] for name, value in match.groupdict().items()}
        return {name: found[name] for name in self.names}


@functools.lru_cache(maxsize=1024)
def _backwards(segment: str, known: tuple[tuple[str, str], ...]) -> re.Pattern[str]:
    """The expression of one part of a path read from its end. Atomic groups: what one has taken, it keeps."""
    values = dict(known)
    literals, names = [""], []
    for index, text in enumerate(CAPTURE.split(segment)):
        if index % 2 and text not in values:
            names.append(text)
            literals.append("")
        else:
            literals[-1] += values[text] if index % 2 else text
    escaped = [re.escape(literal[::-1]) for literal in reversed(literals)]
    expression = escaped[0]
    for place, name in enumerate(reversed(names), 1):
        if place < len(names):
            expression += f"(?>(?P<{name}>[^/]+?){escaped[place]})"
        else:
            expression += f"(?P<{name}>[^/]+){escaped[place]}"
    return re.compile(expression)


def path_pattern(template: str | None, where: str) -> PathPattern | None:
    """The pattern of a path template; a capture is one part of a path, and the same text wherever it is repeated.

    Raises ConfigError that begins with `where`.
    """
    if template is None:
        return None
    if "{" in (rest := CAPTURE.sub("", template)) or "}" in rest:
        raise ConfigError(f"{where}: {template!r} has an unbalanced brace")
    text = ""
    seen: dict[str, None] = {}
    for index, part in enumerate(CAPTURE.split(template)):
        if index % 2 == 0:
            text += re.escape(part)
        elif part in seen:
            text += f"(?P={part})"
        elif part.isidentifier() and part.isascii():
            seen[part] = None
            text += f"(?P<{part}>[^/]+)"
        else:
            raise ConfigError(f"{where}: {{{part}}} in {template!r} is no name of a capture")
    segments = tuple(template.split("/"))
    parts = [name for segment in segments if not CAPTURE.fullmatch(segment) for name in CAPTURE.findall(segment)]
    whole = {segment[1:-1] for segment in segments if CAPTURE.fullmatch(segment)}
    repeated = any(parts.count(name) > 1 for name in parts if name not in whole)
    return PathPattern(tuple(seen), segments, re.compile(text) if repeated else None)


def path_captures(pattern: PathPattern | None, path: str) -> dict[str, str]:
    """What `path` says: ALWAYS, and the captures of the pattern where it matches."""
    folder, _, base = path.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    captures = {"dir": folder, "stem": stem if dot else base, "ext": extension if dot else ""}
    return captures | ((pattern.captures(path) if pattern else None) or {})


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
