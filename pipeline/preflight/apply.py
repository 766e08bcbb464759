"""A copy of a config with what was proposed, which `maskmill label` takes as it is."""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.configfile import load_overrides, load_yaml
from pipeline.errors import ConfigError, StorageError
from pipeline.redaction import is_secret_name

__all__ = ["applied", "default_path", "write_copy"]

TOP_KEY = re.compile(r"^(?P<key>[A-Za-z_][\w-]*)\s*:(\s|$)")
MADE = "# resources: proposed by maskmill {}"


def default_path(config: str, job: str = "preflight", argument: str = "--apply") -> Path:
    """label.yaml -> label.preflight.yaml beside it. Raises ConfigError for a config that is not on this disk."""
    if "://" in config:
        raise ConfigError(f"{argument} needs a PATH for a config that is no local file, got {config}")
    path = Path(config)
    return path.with_name(f"{path.stem if path.suffix in ('.yaml', '.yml') else path.name}.{job}.yaml")


def applied(
    text: str, overrides: Sequence[str], resources: Mapping[str, Any], job: str = "preflight"
) -> tuple[str, list[str]]:
    """The config's text with overrides and `resources` in it, and the fields of overrides that were left out.

    job: which proposes this, as the text says.

    Left out are storage options and credentials: what is given on a command line to keep it out of files stays out.
    Top-level sections that change are written anew, at their places; all else stays as it is written, comments too.
    Where that does not read as what it should be, all of it is written anew. Raises ConfigError.
    """
    kept = [item for item in overrides if not _is_secret(item)]
    before = load_yaml(text, "the config") or {}
    after = load_overrides(kept, load_yaml(text, "the config") or {})
    if resources:
        after["resources"] = {**(after.get("resources") or {}), **resources}
    changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
    made = MADE.format(job)
    result = _edited(text, changed, made)
    try:
        same = load_yaml(result, "the copy") == after
    except ConfigError:
        same = False
    if not same:
        result = f"{made}\n{_dump(after)}"
    return result, [item.partition("=")[0] for item in overrides if _is_secret(item)]


def _is_secret(override: str) -> bool:
    fields = override.partition("=")[0].split(".")
    return "storage" in fields or any(is_secret_name(field) for field in fields)


def _edited(text: str, changed: Mapping[str, Any], made: str) -> str:
    """Top-level blocks of `changed` replaced or appended."""
    blocks: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in text.splitlines():
        match = TOP_KEY.match(line)
        if match:
            blocks.append((match["key"], [line]))
        else:
            blocks[-1][1].append(line)
    left = dict(changed)
    result: list[str] = []
    for key, block in blocks:
        if key is None or key not in left:
            result += block
            continue
        result += _written(key, left.pop(key), made)
        # Comments and empty lines before the next section belong to that.
        end = len(block)
        while end > 1 and (not block[end - 1].strip() or block[end - 1].startswith("#")):
            end -= 1
        result += block[end:]
    for key, value in left.items():
        result += _written(key, value, made)
    return "\n".join(result) + "\n"


def _written(key: str, value: Any, made: str) -> list[str]:
    return ([made] if key == "resources" else []) + _dump({key: value}).splitlines()


def _dump(tree: Any) -> str:
    return yaml.dump(tree, Dumper=_NoAliases, sort_keys=False, allow_unicode=True, width=110)


class _NoAliases(yaml.SafeDumper):
    """Configs may not have anchors and aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_copy(original: str | None, path: Path, text: str, argument: str = "--apply") -> None:
    """Write `text` with the rights of the original file: what it keeps from others, the copy does too.

    Raises ConfigError where that would replace the original, StorageError where it cannot be written.
    """
    mode = 0o600
    if original is not None and "://" not in original and Path(original).exists():
        if path.exists() and os.path.samefile(path, original):
            raise ConfigError(f"{argument} writes a copy, expected another PATH than the config itself, got {path}")
        mode = stat.S_IMODE(Path(original).stat().st_mode)
    part = path.with_name(f"{path.name}.part")
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"{path}: {type(error).__name__}: {error}") from error
