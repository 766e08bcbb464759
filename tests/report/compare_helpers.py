"""Two runs over the same images, made by hand: some images the same in both, some better, some missing or failed."""

import itertools
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import page_helpers
import pyarrow as pa
from report_helpers import (
    depth_score,
    detection_scores,
    failed,
    panoptic_score,
    row,
    semantic_score,
    write_run,
    write_table,
)
from table_helpers import TIME

from pipeline.masks import encode_depth, encode_label_map, encode_rle, rle_area, rle_bbox
from pipeline.predictions.base import Predicted
from pipeline.report.compare.comparison import CompareOptions, write_comparison
from pipeline.report.rows import ScoredTable, open_scored
from pipeline.rows import PREDICTIONS
from pipeline.sources.scenes import render_scene
from pipeline.table import RowTable
from pipeline.tablefiles import file_schema, write_file
from pipeline.taxonomy import Taxonomy

KINDS = ("semantic", "panoptic", "detection", "depth")
Rows = list[dict[str, Any]]


def name_of(image: int) -> str:
    return f"shard {image % 3}/{image}"


def score_of(seed: int, image: int, detections: Sequence[dict[str, Any]], kinds: Sequence[str]) -> dict[str, Any]:
    parts = {
        "semantic": lambda: semantic_score(seed + image),
        "panoptic": lambda: panoptic_score(seed + image),
        "detection": lambda: detections[image],
        "depth": lambda: depth_score(seed + image),
    }
    score: dict[str, Any] = {}
    for kind in kinds:
        score |= parts[kind]()
    return score


def two_runs(seed: int, images: int, kinds: Sequence[str] = KINDS) -> tuple[Rows, Rows]:
    """Rows of A and of B: a third of the images have the same score in both, a quarter are not ok in one or both."""
    rng = random.Random(seed)
    own = detection_scores(seed, images) if "detection" in kinds else []
    other = detection_scores(seed + 1000, images) if "detection" in kinds else []
    runs: tuple[Rows, Rows] = ([], [])
    for image in range(images):
        same, hard = rng.random() < 0.3, rng.random() < 0.1
        for side, rows in enumerate(runs):
            score = score_of(seed, image, own, kinds)
            if side and not same:
                score = score_of(seed + 1000, image, other, kinds)
            fate = rng.random() * (0.15 if hard else 1)
            if fate < 0.06:
                rows.append(failed(name_of(image), rng.choice(["CorruptImageError", "PredictError"])))
            elif fate < 0.1:
                rows.append(row(name_of(image)))
            elif fate > 0.15:
                rows.append(row(name_of(image), score))
    return runs


def ok_ids(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    return {r["image_id"] for r in rows if r["status"] == "ok" and r["score"]}


def opened(folder: Path, rows: Rows, **table: Any) -> ScoredTable:
    (scored,) = open_scored(write_table(folder, rows, **table), {})
    return scored


def compared(folder: Path, a: Rows, b: Rows, *, replicates: int = 100, images: int = 4, **table: Any) -> dict[str, Any]:
    """What compare.json of B with A holds; it lies in folder / "out"."""
    sides = [opened(folder / name, rows, **table) for name, rows in (("a", a), ("b", b))]
    return write_comparison(
        sides[0], sides[1], str(folder / "out"), {}, CompareOptions(replicates=replicates, images=images)
    )


def write_predictions(
    folder: Path,
    kind: str,
    *,
    images: int = 16,
    perfect: bool = False,
    change: Callable[[Predicted], Predicted] = lambda predicted: predicted,
    label: str = "m",
    failing: Collection[int] = (),
    taxonomy: Taxonomy = page_helpers.TAXONOMY,
) -> str:
    """A prediction table of the scenes of page_helpers, labelled without targets.

    kind: labels, panoptic, objects or depth. perfect: the targets themselves, else what a middling model says. change:
    what becomes of each. failing: images that failed.
    """
    table = RowTable.open(str(folder), {}, create=True, schema=PREDICTIONS)
    table.take_over()
    shards: dict[str, Rows] = {}
    for sample, index in itertools.islice(page_helpers.samples(), images):
        whose = {"image_id": sample.image_id, "shard_id": sample.shard_id, "position": sample.position}
        if index in failing:
            own = failed("x/0")
        else:
            predicted = _truth(kind, index) if perfect else page_helpers.predict(kind, index)
            own = row("x/0", width=page_helpers.WIDTH, height=page_helpers.HEIGHT, **_columns(change(predicted)))
        shards.setdefault(sample.shard_id, []).append(own | whose | {"labeled_at": TIME})
    schema = file_schema(PREDICTIONS)
    table.commit(
        [
            write_file(
                str(folder),
                {},
                pa.Table.from_pylist(rows, schema=schema),
                model=label,
                model_version="v1",
                shard_id=shard,
            )
            for shard, rows in shards.items()
        ]
    )
    model = {"label": label, "version": "v1", "task": page_helpers.TASKS[kind], "taxonomy": taxonomy.describe()}
    source = page_helpers.SOURCE.model_dump(mode="json")
    write_run(str(folder), job="label", models=[model], config={"source": source, "score": None})
    return str(folder)


def _truth(kind: str, index: int) -> Predicted:
    scene = render_scene(index, seed=page_helpers.SOURCE.seed, width=page_helpers.WIDTH, height=page_helpers.HEIGHT)
    if kind == "labels":
        return Predicted(label_HW=scene.semantic_HW)
    if kind == "panoptic":
        segments = [{"id": segment.id, "category_id": segment.category_id} for segment in scene.segments]
        return Predicted(segment_HW=scene.segment_HW, segments=tuple(segments))
    if kind == "depth":
        return Predicted(depth_HW=np.where(scene.depth_HW == 0, np.nan, scene.depth_HW))
    raise ValueError(kind)


def _columns(predicted: Predicted) -> dict[str, Any]:
    """The columns of a row, as the encoder of labels writes them."""
    size = {"width": page_helpers.WIDTH, "height": page_helpers.HEIGHT}
    if predicted.label_HW is not None:
        return {"semantic": {"format": "png", "data": encode_label_map(predicted.label_HW)}}
    if predicted.depth_HW is not None:
        return {"depth": encode_depth(predicted.depth_HW, predicted.depth_kind)}
    if predicted.segment_HW is not None:
        masks = [
            (s["id"], s["category_id"], 1.0, encode_rle(predicted.segment_HW == s["id"])) for s in predicted.segments
        ]
    else:
        objects = predicted.objects
        assert objects is not None
        assert objects.score is not None
        masks = [
            (at + 1, category, score, rle["counts"])
            for at, (category, score, rle) in enumerate(
                zip(objects.category_id.tolist(), objects.score.tolist(), objects.rles(), strict=True)
            )
        ]
    return {
        "segments": [
            {
                "id": identifier,
                "category_id": category,
                "score": score,
                "area": rle_area(rle, **size),
                "bbox": list(rle_bbox(rle, **size)),
                "rle": rle,
            }
            for identifier, category, score, rle in masks
        ]
    }
