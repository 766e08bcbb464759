"""Configs from one YAML file plus dotted overrides: read safely, described for `--help`, redacted for run.json."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.config import REFINES, SOURCES, AnySource, Section, SourceConfig
from pipeline.errors import ConfigError
from pipeline.redaction import HIDDEN, is_secret_name, redact_options, redact_text
from pipeline.storage import read_bytes

__all__ = ["describe", "load_config", "load_overrides", "load_yaml", "redacted", "source_from"]

MAX_YAML_BYTES = 1_000_000
SectionT = TypeVar("SectionT", bound=Section)


class _SafeLoader(yaml.SafeLoader):
    """YAML without anchors and aliases (a file of a few lines must not unfold into gigabytes) and without keys that
    stand twice in one mapping (the first would be lost)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError(f"anchors and aliases are not allowed (line {event.start_mark.line + 1})")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"{key.value!r} stands twice in one mapping (line {key.start_mark.line + 1})")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_yaml(text: str, where: str) -> Any:
    """One YAML document of plain values. Raises ConfigError that names `where`."""
    try:
        return yaml.load(text, Loader=_SafeLoader)  # noqa: S506  (a SafeLoader)
    except Exception as error:  # what a tag does not fit raises as it likes: ValueError, KeyError, AttributeError
        problem = str(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            # Not its whole text, which quotes the line, and with it perhaps a secret.
            problem = f"{error.problem} (line {error.problem_mark.line + 1})"
        raise ConfigError(f"{where} is not readable YAML: {' '.join(problem.split())}") from error


def load_config(kind: type[SectionT], uri: str | None, overrides: Sequence[str] = ()) -> SectionT:
    """Read `uri` (YAML), apply `dotted.key=value` overrides (values are YAML), and check the whole.

    Raises ConfigError for unreadable YAML, an unknown key (with the nearest known one), or a value that does not fit;
    StorageError where the file cannot be read.
    """
    tree: Any = {}
    if uri is not None:
        tree = load_yaml(read_bytes(uri, max_bytes=MAX_YAML_BYTES).decode("utf-8", "replace"), uri)
        if not isinstance(tree, dict):
            raise ConfigError(f"{uri} must hold a mapping of fields, got {type(tree).__name__}")
    tree = load_overrides(overrides, tree)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_message(kind, error)) from error


def load_overrides(overrides: Sequence[str], tree: Any = None) -> Any:
    """`dotted.key=value` arguments set in `tree`, which is changed and returned. Raises ConfigError."""
    tree = {} if tree is None else tree
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"expected dotted.key=value, got {override!r}")
        _set(tree, key.split("."), _override_value(value, key), key)
    return tree


def _override_value(text: str, key: str) -> Any:
    """An override's value: YAML where it reads as YAML, else the text itself ({id}_labels.png, *.jpg)."""
    try:
        return load_yaml(text, key)
    except ConfigError:
        return text


def _set(tree: Any, keys: list[str], value: Any, whole: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        slot: Any = key
        if isinstance(tree, list):
            if not key.isdecimal() or len(key) > 9 or int(key) > len(tree):
                raise ConfigError(f"{whole}: expected an index from 0 to {len(tree)}, got {key!r}")
            slot = int(key)
            if slot == len(tree):
                tree.append(None)
        elif not isinstance(tree, dict):
            raise ConfigError(f"{whole}: {'.'.join(keys[:depth])} is a {type(tree).__name__}, it has no field {key!r}")
        if last:
            tree[slot] = value
            return
        if (tree.get(slot) if isinstance(tree, dict) else tree[slot]) is None:
            tree[slot] = [] if keys[depth + 1].isdecimal() else {}
        tree = tree[slot]


def _message(kind: type[Section], error: ValidationError) -> str:
    lines: dict[str, list[str]] = {}
    ends: dict[str, str] = {}
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"] if part not in UNION_TAGS]
        if item["type"] == "too_short" and item["input"]:
            continue  # pydantic counts only the items that are right
        if item["type"] == "extra_forbidden":
            where, key = ".".join(_without_tags(path[:-1])), path[-1]
            close = difflib.get_close_matches(key, _fields_at(kind, path[:-1]), n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            lines[f"unknown key {key!r} in {where or 'the config'}{hint}"] = []
        else:
            where = ".".join(_without_tags(path)) or "config"
            text = item["msg"].removeprefix("Value error, ")
            lines.setdefault(where, []).append(f"{text[0].lower()}{text[1:]}")
            secret = "storage" in path
            got = type(item["input"]).__name__ if secret else _short(item["input"])
            ends[where] = "" if item["type"] in {"missing", "value_error"} else f", got {got}"
    return "; ".join(
        f"{where}: {' or '.join(texts)}{ends[where]}" if texts else where for where, texts in lines.items()
    )


def _short(value: Any) -> str:
    """A value for a message. Of a mapping its keys: the values may be credentials."""
    if isinstance(value, Mapping):
        text = f"a mapping of {', '.join(map(str, value)) or 'nothing'}"
    elif isinstance(value, list | tuple):
        text = f"a list of {len(value)}"
    else:
        text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


# What pydantic puts into the path of a union's error, one for each type that the value could have.
UNION_TAGS = {"int", "float", "constrained-int", "constrained-float", "literal['auto']"}


def _without_tags(path: list[str]) -> list[str]:
    """Pydantic puts the tag of a discriminated union into the path; nobody wrote it there."""

    def is_tag(index: int, part: str) -> bool:
        before = path[max(0, index - 2) : index]
        return (before[-1:] == ["source"] and part in SOURCES) or (before[:1] == ["refine"] and part in REFINES)

    return [part for index, part in enumerate(path) if not is_tag(index, part)]


def _section(annotation: Any, path: list[str]) -> type[Section] | None:
    if not path and isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if isinstance(annotation, type) and issubclass(annotation, Section):
        field = annotation.model_fields.get(path[0])
        return _section(field.annotation, path[1:]) if field else None
    for option in get_args(annotation):
        if path and isinstance(option, type) and issubclass(option, Section):
            tag = option.model_fields.get("format") or option.model_fields.get("kind")
            if tag and path[0] in get_args(tag.annotation):
                return _section(option, path[1:])
        found = _section(option, path[1:] if path and path[0].isdecimal() else path)
        if found:
            return found
    return None


def _fields_at(kind: type[Section], path: list[str]) -> list[str]:
    section = _section(kind, path)
    return list(section.model_fields) if section else []


def describe(kind: type[Section], prefix: str = "") -> list[tuple[str, str, str]]:
    """Every field as (dotted name, default, meaning), nested sections unfolded, for `--help`."""
    rows: list[tuple[str, str, str]] = []
    for name, field in kind.model_fields.items():
        dotted = f"{prefix}{name}"
        if field.annotation is not None and name == "source":
            rows.append((f"{dotted}.format", "required", " | ".join(SOURCES)))
            common = {f"{dotted}.{field}" for field in (*AnySource.model_fields, "format")}
            rows += describe(AnySource, f"{dotted}.")
            for tag, kind_of_source in SOURCES.items():
                own = [row for row in describe(kind_of_source, f"{dotted}.") if row[0] not in common]
                rows += [(field, default, f"[{tag}] {text}") for field, default, text in own]
            continue
        if name == "refine":
            rows.append((f"{dotted}.N.kind", "required", f"{field.description}"))
            for tag, kind_of_stage in REFINES.items():
                own = [row for row in describe(kind_of_stage, f"{dotted}.N.") if row[0] != f"{dotted}.N.kind"]
                rows += [(field, default, f"[{tag}] {text}") for field, default, text in own]
            continue
        section = _section(field.annotation, []) or _section(field.annotation, ["0"])
        if section is not None:
            repeated = ".N." if get_origin(field.annotation) is tuple else "."
            rows += describe(section, f"{dotted}{repeated}")
            continue
        default = "required" if field.is_required() else json.dumps(field.default, default=str)
        rows.append((dotted, default, field.description or ""))
    return rows


def redacted(config: Section) -> dict[str, Any]:
    """The resolved config as plain values without credentials: every storage option's value is hidden except addresses
    and switches, and elsewhere what a field's name or an address says to be one."""

    def walk(value: Any, key: str = "") -> Any:
        if key == "storage" and isinstance(value, Mapping):
            return redact_options(value)
        if isinstance(value, Mapping):
            return {name: walk(item, str(name)) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [walk(item, key) for item in value]
        if not isinstance(value, str):
            return value
        return HIDDEN if is_secret_name(key) else redact_text(value)

    result: dict[str, Any] = walk(config.model_dump(mode="json"))
    return result


def source_from(tree: Mapping[str, Any]) -> "SourceConfig":
    """A source section alone, as run.json keeps it. Raises ConfigError."""
    try:
        return SOURCES[tree["format"]].model_validate(dict(tree))  # type: ignore[return-value]
    except (KeyError, ValidationError) as error:
        raise ConfigError(f"not a source: {' '.join(str(error).split())[:300]}") from error
