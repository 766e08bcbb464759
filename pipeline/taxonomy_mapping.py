"""From one label space to another: by name, alias, explicit id or merge list, as a lookup table."""

import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.configfile import load_yaml
from pipeline.errors import ConfigError, TargetMismatchError
from pipeline.taxonomy import Category, Taxonomy

__all__ = ["TaxonomyMapping", "map_taxonomy"]

IDS = 1 << 16

NameOrId = str | int


@dataclass(frozen=True, eq=False)
class TaxonomyMapping:
    """A label space seen as another.

    pairs: source id -> target id, where mapped. unmapped: source classes that became `other_id` (void, or a class of
    the target). unused: target classes that nothing maps to, so that no prediction can have them.
    """

    source: Taxonomy
    target: Taxonomy
    pairs: Mapping[int, int]
    other_id: int

    @functools.cached_property
    def unmapped(self) -> tuple[Category, ...]:
        return tuple(c for c in self.source.categories if c.id not in self.pairs)

    @functools.cached_property
    def unused(self) -> tuple[Category, ...]:
        reached = {*self.pairs.values(), *([self.other_id] if self.unmapped else [])}
        return tuple(c for c in self.target.categories if c.id not in reached)

    @functools.cached_property
    def lookup(self) -> npt.NDArray[np.uint16]:
        """By source id, (65536,) uint16: the target's id or its void. Ids that the source lacks are void as well."""
        table = np.full(IDS, self.target.void_id, np.uint16)
        for category in self.source.categories:
            table[category.id] = self.pairs.get(category.id, self.other_id)
        return table

    @functools.cached_property
    def _known(self) -> npt.NDArray[np.bool_]:
        known = np.zeros(IDS, bool)
        known[[*self.source.ids, self.source.void_id, *self.source.void_ids]] = True
        return known

    def apply(self, label_HW: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
        """A label map of the source as one of the target, in the target's dtype.

        Raises TargetMismatchError for ids that the source taxonomy does not have and that are not its void.
        """
        if label_HW.size and (label_HW.min() < 0 or label_HW.max() >= IDS):
            raise TargetMismatchError(
                f"expected ids of {self.source.name}, 0 to {IDS - 1}, got {label_HW.min()} to {label_HW.max()}"
            )
        size = int(label_HW.max()) + 1 if label_HW.size else 0
        present = np.zeros(size, bool)
        present[label_HW] = True
        self._refuse(np.flatnonzero(present & ~self._known[:size]))
        mapped: npt.NDArray[Any] = self.lookup.astype(self.target.dtype)[label_HW]
        return mapped

    def apply_ids(self, category_ids: npt.NDArray[np.integer[Any]] | Sequence[int]) -> npt.NDArray[np.int64]:
        """Category ids of segments, (N) int64; those that became void are the target's void_id, to be left out.

        Raises TargetMismatchError for ids that the source taxonomy does not have.
        """
        ids = np.asarray(category_ids, np.int64)
        outside = ids[(ids < 0) | (ids >= IDS)]
        self._refuse(outside if len(outside) else ids[~self._known[ids]])
        return self.lookup[ids].astype(np.int64)

    def describe(self) -> dict[str, Any]:
        """What a report shows: every class and where it went."""
        other = self.target.by_id.get(self.other_id)
        names = {c.id: c.name for c in self.target.categories}
        return {
            "source": self.source.name,
            "target": self.target.name,
            "mapped": {c.name: names[self.pairs[c.id]] for c in self.source.categories if c.id in self.pairs},
            "unmapped": [c.name for c in self.unmapped],
            "unmapped_become": other.name if other else "void",
            "unused": [c.name for c in self.unused],
        }

    def _refuse(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        if len(ids):
            found = sorted(set(ids.tolist()))
            raise TargetMismatchError(f"expected ids of {self.source.name} or its void, got {found[:20]}")


def map_taxonomy(
    source: Taxonomy,
    target: Taxonomy,
    *,
    merge: Mapping[NameOrId, Sequence[NameOrId]] | None = None,
    ids: Mapping[int, int] | None = None,
    other: NameOrId | None = None,
) -> TaxonomyMapping:
    """Map each class of `source`: by `ids` (source id -> target id), else by `merge` (target class -> source classes,
    each by name or id), else to the class of the same name or alias, else to `other` (void where None).

    Names are compared without case, spaces, hyphens and underscores, and through taxonomies/aliases.yaml. A class that
    `merge` names as a target takes only what its list says, so that an empty list keeps it out.

    Raises ConfigError for a class that does not exist (with close matches), one mapped twice, or no class in common.
    """
    pairs: dict[int, int] = {}
    for given, wanted in (ids or {}).items():
        pairs[_find(source, given, "ids").id] = _find(target, wanted, "ids").id
    taken: set[int] = set()
    for wanted_class, sources in (merge or {}).items():
        into = _find(target, wanted_class, "merge")
        taken.add(into.id)
        if isinstance(sources, str) or not isinstance(sources, Sequence):
            raise ConfigError(f"merge.{wanted_class} must be a list of classes of {source.name}, got {sources!r}")
        for name in sources:
            category = _find(source, name, f"merge.{wanted_class}")
            if pairs.get(category.id, into.id) != into.id:
                already = target.by_id[pairs[category.id]].name
                raise ConfigError(f"merge.{wanted_class}: {category.name} is mapped to {already} as well")
            pairs[category.id] = into.id
    by_name: dict[str, list[Category]] = {}
    for category in target.categories:
        by_name.setdefault(_canonical(category.name), []).append(category)
    for category in source.categories:
        same = by_name.get(_canonical(category.name), [])
        # An exact name goes before an alias, where a space has both.
        same = [c for c in same if _plain(c.name) == _plain(category.name)] or same
        if category.id in pairs or not same or same[0].id in taken:
            continue
        if len(same) > 1:
            raise ConfigError(
                f"{category.name} of {source.name} is {' or '.join(c.name for c in same)} of {target.name}; say which "
                "by ids or merge"
            )
        pairs[category.id] = same[0].id
    other_id = target.void_id if other is None else _find(target, other, "other").id
    if not pairs:
        raise ConfigError(f"{source.name} and {target.name} have no class in common; say which are by ids or merge")
    return TaxonomyMapping(source, target, dict(sorted(pairs.items())), other_id)


def _find(taxonomy: Taxonomy, name: NameOrId, where: str) -> Category:
    if isinstance(name, int) and not isinstance(name, bool):
        if name in taxonomy.by_id:
            return taxonomy.by_id[name]
        raise ConfigError(f"{where}: {taxonomy.name} has no id {name}; ids: {_few(sorted(taxonomy.ids))}")
    text = str(name)
    for key in (_plain, _canonical):
        found = [c for c in taxonomy.categories if key(c.name) == key(text)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"{where}: {text!r} is more than one class of {taxonomy.name}; give its id")
    names = {c.name.lower(): c.name for c in taxonomy.categories}
    close = [names[match] for match in difflib.get_close_matches(text.lower(), names, n=3)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"classes: {_few(sorted(names.values()))}"
    raise ConfigError(f"{where}: {taxonomy.name} has no class {text!r}; {hint}")


def _few(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:20])) + (", ..." if len(values) > 20 else "")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in " -_")


def _canonical(name: str) -> str:
    plain = _plain(name)
    return _aliases().get(plain, plain)


@functools.cache
def _aliases() -> Mapping[str, str]:
    """Each plain name of an alias line -> the first of its line."""
    where = "taxonomies/aliases.yaml"
    lines = load_yaml((resources.files("pipeline") / "taxonomies" / "aliases.yaml").read_text("utf-8"), where)
    table: dict[str, str] = {}
    for line in lines:
        for name in line:
            if table.setdefault(_plain(name), _plain(line[0])) != _plain(line[0]):
                raise ConfigError(f"{where}: {name} is in more than one line")
    return table
