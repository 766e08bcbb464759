"""Label spaces: ids, names, thing or stuff, colours and void, as YAML data with their source named."""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.configfile import load_yaml
from pipeline.errors import ConfigError
from pipeline.storage import read_bytes

__all__ = ["Category", "Taxonomy", "build_taxonomy", "bundled_taxonomies", "load_taxonomy"]

MAX_TAXONOMY_BYTES = 2_000_000


@dataclass(frozen=True, slots=True)
class Category:
    """One class: its id in label maps and JSON, name, kind and display colour (R, G, B)."""

    id: int
    name: str
    kind: Literal["thing", "stuff"]
    color: tuple[int, int, int]


@dataclass(frozen=True)
class Taxonomy:
    """A label space. `void_id` marks pixels without a class: 255 where all ids are below it, else 65535.

    `void_ids` are further ids that mean the same in the data set's own files, such as CamVid's 11 or ADE20K's 0.
    """

    name: str
    source: str
    categories: tuple[Category, ...]
    void_ids: tuple[int, ...] = ()

    @functools.cached_property
    def by_id(self) -> Mapping[int, Category]:
        return {category.id: category for category in self.categories}

    @functools.cached_property
    def ids(self) -> tuple[int, ...]:
        return tuple(category.id for category in self.categories)

    @property
    def void_id(self) -> int:
        return 255 if max(self.ids) < 255 else 65535

    @property
    def dtype(self) -> npt.DTypeLike:
        """The smallest unsigned type of a label map in this space: uint8 or uint16."""
        return np.uint8 if self.void_id == 255 else np.uint16

    def describe(self) -> dict[str, Any]:
        """Plain values that `build_taxonomy` takes back."""
        # Absent where empty: a model's version is a hash over this, and it is older than the field.
        void_ids = {"void_ids": list(self.void_ids)} if self.void_ids else {}
        return {
            "name": self.name,
            "source": self.source,
            **void_ids,
            "categories": [
                {"id": c.id, "name": c.name, "kind": c.kind, "color": list(c.color)} for c in self.categories
            ],
        }

    @functools.cached_property
    def palette(self) -> npt.NDArray[np.uint8]:
        """Colours by id, (void_id + 1, 3) uint8; void and unknown ids are black."""
        colors = np.zeros((self.void_id + 1, 3), np.uint8)
        for category in self.categories:
            colors[category.id] = category.color
        return colors


def load_taxonomy(name_or_uri: str, storage: Mapping[str, Any] | None = None) -> Taxonomy:
    """A bundled taxonomy by name, or one from a YAML file of the same form.

    Raises ConfigError for an unknown name (with close matches) or a file that does not hold a taxonomy.
    """
    if name_or_uri in bundled_taxonomies():
        text = (resources.files("pipeline") / "taxonomies" / f"{name_or_uri}.yaml").read_text("utf-8")
        return parse_taxonomy(text, name_or_uri)
    if name_or_uri.endswith((".yaml", ".yml")):
        text = read_bytes(name_or_uri, storage, max_bytes=MAX_TAXONOMY_BYTES).decode("utf-8", "replace")
        return parse_taxonomy(text, name_or_uri)
    close = difflib.get_close_matches(name_or_uri, bundled_taxonomies(), n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else f"; bundled: {', '.join(bundled_taxonomies())}"
    raise ConfigError(f"unknown taxonomy {name_or_uri!r}{hint}, or give a .yaml file")


@functools.cache
def bundled_taxonomies() -> tuple[str, ...]:
    folder = resources.files("pipeline") / "taxonomies"
    names = {item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")}
    return tuple(sorted(names - {"aliases"}))


def parse_taxonomy(text: str, where: str) -> Taxonomy:
    """Build a taxonomy from YAML: `name`, `source`, `categories: [{id, name, kind, color}]`, optional `void_ids`."""
    return build_taxonomy(load_yaml(text, where), where)


def build_taxonomy(tree: Any, where: str) -> Taxonomy:
    """Build a taxonomy from the plain values that `Taxonomy.describe` gives. Raises ConfigError."""
    try:
        categories = tuple(
            Category(_whole(item["id"]), _text(item["name"]), item["kind"], tuple(map(_whole, item["color"])))  # type: ignore[arg-type]
            for item in tree["categories"]
        )
        void_ids = tuple(map(_whole, tree.get("void_ids", ())))
        taxonomy = Taxonomy(_text(tree["name"]), _text(tree["source"]), categories, void_ids)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where} holds no taxonomy: {type(error).__name__}: {error}") from error
    ids = taxonomy.ids
    if not ids or len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= 65535:
        raise ConfigError(f"{where}: ids must be unique, 0 to 65534, at least one; got {sorted(ids)[:20]}")
    if set(void_ids) & set(ids) or (void_ids and not 0 <= min(void_ids) <= max(void_ids) <= 65535):
        raise ConfigError(f"{where}: void_ids must be 0 to 65535 and no category's, got {list(void_ids)}")
    for category in categories:
        if (
            category.kind not in ("thing", "stuff")
            or len(category.color) != 3
            or not all(0 <= value <= 255 for value in category.color)
        ):
            raise ConfigError(f"{where}: category {category.id}: kind must be thing or stuff, color three bytes")
    return taxonomy


def _whole(value: Any) -> int:
    """The number itself, not what it is rounded to: 3.7 or "3" is a mistake somewhere."""
    number = int(value)
    if number != value:
        raise ValueError(f"expected a whole number, got {value!r:.80}")
    return number


def _text(value: Any) -> str:
    """YAML reads an unquoted name such as 7 as a number."""
    if not isinstance(value, str | int | float):
        raise TypeError(f"expected a name, got a {type(value).__name__}")
    return str(value)
