"""Pictures of images in two runs: what both saw beside the target, or beside each other where there is none."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline.errors import RunError
from pipeline.preview import read_images
from pipeline.report.gallery import Panel, Picture
from pipeline.report.pictures import SHOWN, describe_run, draw, read_entries
from pipeline.report.rows import ScoredTable
from pipeline.schema import MODEL
from pipeline.sources.base import Sample

__all__ = ["agreement_pictures", "change_pictures"]

Entry = Mapping[str, Any]
Overrides = Mapping[str, Any]
Lists = Mapping[str, Sequence[Entry]]

# In columns of two: the inputs, the predictions, the errors.
CHANGE_PANELS = ("image", "target", "A", "B", "error of A", "error of B")
AGREEMENT_PANELS = {"image": "image", "target": "A", "prediction": "B", "error": "difference"}


def change_pictures(
    comparison: Mapping[str, Any],
    a: ScoredTable,
    b: ScoredTable,
    overrides_a: Overrides,
    overrides_b: Overrides,
) -> dict[str, list[Picture]]:
    """Pictures by `improved:FIGURE` and `regressed:FIGURE`, as `render_comparison` takes them, for one figure of each
    section.

    overrides_*: as `report_pictures` takes them; the images and targets are those of B's source. Raises ConfigError,
    StorageError.
    """
    images = comparison["images"]
    lists = {f"{end}:{path}": images[path][end] for path in _shown(images) for end in ("improved", "regressed")}
    entries = _once(lists)
    if not entries:
        return {}
    described = describe_run(b, overrides_b)
    of_b = draw(entries, read_entries(described.source, entries), b, described)
    own = describe_run(a, overrides_a)._replace(source=described.source)
    of_a = draw(entries, read_entries(described.source, entries), a, own)
    return _listed(lists, entries, [_beside(*pair) for pair in zip(of_a, of_b, strict=True)])


def agreement_pictures(
    comparison: Mapping[str, Any],
    a: ScoredTable,
    scored: ScoredTable,
    overrides_a: Overrides,
    overrides_scored: Overrides,
) -> dict[str, list[Picture]]:
    """Pictures by figure of `disagreement`, for one figure of each section.

    scored: B held against A. overrides_a: for the source of A, whose images they are; where it cannot be read any more
    they are drawn without. overrides_scored: for both tables, `source` and `predictions`. Raises ConfigError,
    StorageError.
    """
    disagreement = comparison["disagreement"]
    lists = {path: disagreement[path] for path in _shown(disagreement)}
    entries = _once(lists)
    if not entries:
        return {}
    described = describe_run(scored, overrides_scored)
    samples = list(_with_images(list(read_images(described.source, entries, images=False)), a, overrides_a))
    pictures = draw(entries, samples, scored, described)
    renamed = [
        replace(picture, panels=tuple(panel._replace(name=AGREEMENT_PANELS[panel.name]) for panel in picture.panels))
        for picture in pictures
    ]
    return _listed(lists, entries, renamed)


def _shown(figures: Mapping[str, Any]) -> Iterator[str]:
    for names in SHOWN:
        yield from next(([name] for name in names if name in figures), [])


def _once(lists: Lists) -> list[Entry]:
    """The entries of all lists, each image once."""
    return list({_place(entry): entry for found in lists.values() for entry in found}.values())


def _place(entry: Entry) -> tuple[str, int]:
    return entry["shard_id"], entry["position"]


def _listed(lists: Lists, entries: Sequence[Entry], pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    drawn = {_place(entry): picture for entry, picture in zip(entries, pictures, strict=True)}
    return {key: [drawn[_place(entry)] for entry in found] for key, found in lists.items()}


def _beside(a: Picture, b: Picture) -> Picture:
    """The panels of one image in two runs as CHANGE_PANELS."""
    of_a, of_b = ({panel.name: panel for panel in picture.panels} for picture in (a, b))
    found = (
        of_b.get("image") or of_a.get("image"),
        of_b.get("target") or of_a.get("target"),
        of_a.get("prediction"),
        of_b.get("prediction"),
        of_a.get("error"),
        of_b.get("error"),
    )
    panels = tuple(
        Panel(name, panel.data, panel.mime) for name, panel in zip(CHANGE_PANELS, found, strict=True) if panel
    )
    notes = (
        [a.note] if a.note == b.note else [f"{name}: {text}" for name, text in (("A", a.note), ("B", b.note)) if text]
    )
    return replace(b, panels=panels, note="; ".join(notes))


def _with_images(
    samples: Sequence[tuple[Sample, int]], a: ScoredTable, overrides: Overrides
) -> Iterator[tuple[Sample, int]]:
    """The samples of a table, which have no images, with those of the table's source."""
    wanted = {
        MODEL: a.model["label"],
        "model_version": a.model["version"],
        "image_id": pa.array([sample.image_id for sample, _ in samples], pa.string()),
    }
    rows = [row for batch in a.table.scan(["image_id", "shard_id", "position"], wanted) for row in batch.to_pylist()]
    try:
        source = describe_run(a, overrides).source
        images = {rows[at]["image_id"]: sample for sample, at in read_images(source, rows)}
    except RunError:
        images = {}
    for sample, at in samples:
        found = images.get(sample.image_id)
        yield (sample if found is None else replace(sample, image=found.image, error=found.error)), at
