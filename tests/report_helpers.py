"""Tables of scores made by hand, for the tests of reports: any states, any cut into files, and their run.json."""

import io
import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from dense_helpers import blocky, scene
from detection_oracle import random_case
from PIL import Image
from table_helpers import TIME

from pipeline.config import ScenesSource, ScoreConfig
from pipeline.masks import encode_panoptic_png, rle_bbox
from pipeline.metrics.detection_match import Objects
from pipeline.predictions.base import Predicted
from pipeline.rows import PREDICTIONS, SCORES
from pipeline.sources.base import Sample, read_unit
from pipeline.sources.scenes import Scenes
from pipeline.stages.score import Scorer
from pipeline.storage import join, open_fs
from pipeline.table import RowTable
from pipeline.tablefiles import file_schema, write_file
from pipeline.targets import read_label_map
from pipeline.taxonomy import Category, Taxonomy, load_taxonomy

MODEL, VERSION = "m", "v1"
LABELLED = ScenesSource(format="scenes", count=10, width=48, height=32, unit_images=4)
TASK_SPACE = load_taxonomy("scenes")
SPACE = Taxonomy(
    "test",
    "made here",
    tuple(Category(n, f"class {n}", "thing" if n < 3 else "stuff", (0, 40 * n, 0)) for n in range(1, 5)),
)


def row(image_id: str, score: Mapping[str, Any] | None = None, **columns: Any) -> dict[str, Any]:
    """A row of either table; shard_id and position are read off an image_id such as shard/7."""
    shard_id, _, position = image_id.rpartition("/")
    return {
        "image_id": image_id,
        "shard_id": shard_id,
        "position": int(position),
        "width": 640,
        "height": 480,
        "model_version": VERSION,
        "status": "ok",
        "run_id": "run",
        "score": score,
        **columns,
    }


def failed(image_id: str, kind: str = "CorruptImageError", stage: str = "decode", **columns: Any) -> dict[str, Any]:
    error = {"error_type": kind, "error_stage": stage, "error_message": f"bad {image_id}", "attempts": 1}
    return row(image_id, None, status="failed", width=None, height=None, **error, **columns)


def write_table(
    uri: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    job: str = "label",
    cuts: Sequence[int] = (),
    taxonomy: Taxonomy = SPACE,
    models: Sequence[str] = (MODEL,),
    storage: Mapping[str, Any] | None = None,
    **run: Any,
) -> str:
    """A prediction table (job label) or a scores table (evaluate). cuts: where files end. Each model has the rows."""
    uri, storage = str(uri), storage or {}
    schema = SCORES if job == "evaluate" else PREDICTIONS
    table = RowTable.open(uri, storage, create=True, schema=schema)
    table.take_over()
    edges = [0, *sorted(cuts), len(rows)]
    when = "scored_at" if job == "evaluate" else "labeled_at"
    files = []
    for start, stop in itertools.pairwise(edges):
        for model in models if stop > start else ():
            part = pa.Table.from_pylist([{**r, when: TIME} for r in rows[start:stop]], schema=file_schema(schema))
            files.append(write_file(uri, storage, part, model=model, model_version=VERSION, shard_id=""))
    table.commit(files)
    write_run(uri, job=job, models=[describe(model, taxonomy) for model in models], storage=storage, **run)
    return uri


def describe(label: str, taxonomy: Taxonomy) -> dict[str, Any]:
    whole = taxonomy.describe()
    more = {"score_taxonomy": whole, "mapping": None, "license": "MIT", "parameters": 5}
    return {"label": label, "version": VERSION, "task": "semantic", "taxonomy": whole, **more}


def write_run(uri: str, *, storage: Mapping[str, Any] | None = None, **run: Any) -> None:
    whole = {"run_id": "20240506T070809-abcdef", "state": "done", "config": {}, "code": {}, **run}
    fs, path = open_fs(join(uri, "run.json"), storage)
    fs.pipe_file(path, json.dumps(whole).encode())


def scorer(taxonomy: Taxonomy = SPACE, **options: Any) -> Scorer:
    return Scorer.build(ScoreConfig(**options), taxonomy, taxonomy, max_pixels=10**8)


def png(map_HW: Any) -> bytes:
    """A label map as an 8- or 16-bit PNG."""
    buffer = io.BytesIO()
    Image.fromarray(map_HW).save(buffer, "PNG")
    return buffer.getvalue()


def label_maps(seed: int, height: int = 12, width: int = 15) -> tuple[Any, Any]:
    """(target_HW, pred_HW) of SPACE with void, mostly alike."""
    target_HW = blocky(seed, height, width, [1, 2, 3, 4, 255]).astype(np.uint8)
    return target_HW, np.where(blocky(seed + 1, height, width, [0, 1], 2) > 0, 1 + seed % 4, target_HW).astype(np.uint8)


def semantic_score(seed: int) -> dict[str, Any]:
    target_HW, pred_HW = label_maps(seed)
    score = scorer().score(Predicted(label_HW=pred_HW), {"semantic": png(target_HW)}, key="")
    assert score is not None
    return score


def panoptic_score(seed: int) -> dict[str, Any]:
    target_HW, target, pred_HW, pred = scene(seed, 16, 20)
    targets = {"panoptic": encode_panoptic_png(target_HW), "segments": json.dumps(target).encode()}
    score = scorer().score(Predicted(segment_HW=pred_HW, segments=tuple(pred)), targets, key="")
    assert score is not None
    return score


def detection_score(key: str | int, targets: Iterable[Mapping[str, Any]], results: Iterable[Mapping[str, Any]]) -> Any:
    """Of one image of 120x160 in COCO's terms."""
    size = {"height": 120, "width": 160}
    instances = json.dumps({"annotations": list(targets), **size}).encode()
    pred = Objects.from_results(list(results), **size)
    return scorer().score(Predicted(objects=pred), {"instances": instances}, key=key)


def depth_score(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    target_HW = rng.integers(500, 9000, (6, 7)).astype(np.uint16)
    pred_HW = target_HW / 1000 * np.exp(rng.normal(0, 0.2, target_HW.shape))
    score = scorer().score(Predicted(depth_HW=pred_HW), {"depth": png(target_HW)}, key="")
    assert score is not None
    return score


def detection_scores(seed: int, images: int) -> list[dict[str, Any]]:
    """Of random images with crowds and ties of scores, boxes and masks, image by image."""
    targets, results = random_case(seed, "segm", images=images)
    boxes = [
        {**result, "bbox": rle_bbox(result["segmentation"]["counts"], width=160, height=120)} for result in results
    ]
    return [
        detection_score(
            image["id"],
            [item for item in targets["annotations"] if item["image_id"] == image["id"]],
            [item for item in boxes if item["image_id"] == image["id"]],
        )
        for image in targets["images"]
    ]


def mixed_rows(seed: int, images: int) -> list[dict[str, Any]]:
    """Rows with every state, some with none of a kind, some that failed, some without a target; with fields."""
    rng = random.Random(seed)
    detections = detection_scores(seed, images)
    rows: list[dict[str, Any]] = []
    for n in range(images):
        name = f"shard {rng.randrange(3)}/{n}"
        fields = [("city", rng.choice(["aachen", "bochum"])), ("night", str(n % 2))] if rng.random() < 0.7 else None
        score: dict[str, Any] = {}
        for part in (semantic_score(seed + n), panoptic_score(seed + n), depth_score(seed + n), detections[n]):
            score |= part if rng.random() < 0.8 else {}
        fate = rng.random()
        if fate < 0.1:
            rows.append(failed(name, rng.choice(["CorruptImageError", "PredictError"]), fields=fields))
        elif fate < 0.2 or not score:
            rows.append(row(name, rng.choice([None, {"error_type": "TargetMismatchError", "error_message": "no"}])))
        else:
            rows.append(row(name, score, fields=fields))
    return rows


def label_rows() -> list[dict[str, Any]]:
    """Every image of LABELLED with its target as its prediction, of which image n has 3 n rows of pixels wrong."""
    source = Scenes(LABELLED)
    scorer = Scorer.build(ScoreConfig(), TASK_SPACE, TASK_SPACE, max_pixels=10**6)
    rows = []
    samples = [item for unit in source.plan() for item in read_unit(source, unit, ()) if isinstance(item, Sample)]
    for number, sample in enumerate(samples):
        label_HW = read_label_map(sample.targets["semantic"], max_pixels=10**6).copy()
        label_HW[: 3 * number] = (label_HW[: 3 * number] + 1) % len(TASK_SPACE.ids)
        score = scorer.score(Predicted(label_HW=label_HW), sample.targets, key=sample.image_id)
        # A second figure, of which other images are the worst.
        score = {**(score or {}), **depth_score(number)}
        whose = {"image_id": sample.image_id, "shard_id": sample.shard_id, "position": sample.position}
        size = {"width": 48, "height": 32}
        rows.append(row("x/0", score, semantic={"format": "png", "data": png(label_HW)}) | whose | size)
    return rows
