"""What differs in how two runs came about (config, weights, code), and what of it blurs the comparison."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["settings", "states", "warnings"]

Tree = Mapping[str, Any]

# Where a run wrote to and what it ran on say nothing of its labels; of the models one has its own place.
LEFT_OUT = {"output", "resources", "ray_address", "workers", "models"}
MODEL = (
    "label",
    "name",
    "version",
    "prediction_version",
    "task",
    "taxonomy",
    "score_taxonomy",
    "license",
    "parameters",
)
MAX_VALUE = 300
# Keys of the source that do not change what an image's target is.
SCOPE = {"limit", "count", "start", "unit_images", "storage", "max_bytes"}


def settings(a: Tree, b: Tree) -> list[dict[str, Any]]:
    """[{name, a, b}] of what differs, each value as text, None where a run does not have it.

    a, b: `provenance` of the runs, {model, run}.
    """
    flat_a, flat_b = dict(_settings(a)), dict(_settings(b))
    return [
        {"name": name, "a": flat_a.get(name), "b": flat_b.get(name)}
        for name in [*flat_a, *(name for name in flat_b if name not in flat_a)]
        if flat_a.get(name) != flat_b.get(name)
    ]


def _settings(side: Tree) -> Iterator[tuple[str, str]]:
    model, run = side["model"], side["run"]
    yield from (("model." + name, _text(model[name])) for name in MODEL if model.get(name) is not None)
    yield from _flat(_model_config(model, run), "model.config.")
    config = run.get("config") or {}
    yield from _flat({name: value for name, value in config.items() if name not in LEFT_OUT}, "config.")
    yield from _flat(run.get("code") or {}, "code.")


def _model_config(model: Tree, run: Tree) -> Tree:
    """The entry of the config that this model comes from: labels are unique, and default to the spec's name."""
    entries: Sequence[Tree] = (run.get("config") or {}).get("models") or ()
    for entry in entries:
        if isinstance(entry, Mapping) and (entry.get("label") or entry.get("name") or model["name"]) == model["label"]:
            return entry
    return {}


def _flat(tree: Tree, prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None and value != {}:
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"


def warnings(a: Tree, b: Tree) -> list[str]:
    """Sentences on what makes a difference of figures more than a difference of models."""
    found = []
    config_a, config_b = (side["run"].get("config") or {} for side in (a, b))
    score_a, score_b = (dict(_flat(config.get("score") or {}, "")) for config in (config_a, config_b))
    other = sorted(name for name in {*score_a, *score_b} if score_a.get(name) != score_b.get(name))
    if other:
        values = "; ".join(f"{name}: {score_a.get(name, 'unset')}, {score_b.get(name, 'unset')}" for name in other)
        found.append(f"A and B were scored with other options ({values}).")
    source_a, source_b = (_targets(config.get("source") or {}) for config in (config_a, config_b))
    if source_a != source_b:
        names = sorted(name for name in {*source_a, *source_b} if source_a.get(name) != source_b.get(name))
        found.append(f"A and B were scored against targets of other sources ({', '.join(names)} differ).")
    return [*found, *states(a, b)]


def states(a: Tree, b: Tree) -> list[str]:
    """A sentence on each run that is not done."""
    return [
        f"The run of {name} is not done: its state is {side['run']['state']}."
        for name, side in (("A", a), ("B", b))
        if side["run"].get("state", "done") != "done"
    ]


def _targets(source: Tree) -> dict[str, str]:
    return dict(_flat({name: value for name, value in source.items() if name not in SCOPE}, ""))
