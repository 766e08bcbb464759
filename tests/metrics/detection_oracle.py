"""COCOeval beside ours on the same annotations: the oracle of the tests and of the benchmark."""

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.metrics.detection import Detection
from pipeline.metrics.detection_match import IouType, Objects

Json = dict[str, Any]
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SIZE = (120, 160)


def coco_eval(targets: Json, results: Sequence[Json], iou_type: IouType) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(targets)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(list(results))), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def our_states(targets: Json, results: Sequence[Json], iou_type: IouType) -> list[Detection]:
    """One state for each image, in the order of the file."""
    by_image: dict[int, tuple[list[Json], list[Json]]] = {image["id"]: ([], []) for image in targets["images"]}
    for annotation in targets["annotations"]:
        by_image[annotation["image_id"]][0].append(annotation)
    for result in results:
        by_image[result["image_id"]][1].append(result)
    states = []
    for image in targets["images"]:
        size = {"height": image["height"], "width": image["width"]}
        wanted, got = by_image[image["id"]]
        pred, target = Objects.from_results(got, **size), Objects.from_annotations(wanted, **size)
        states.append(Detection.from_image(image["id"], pred, target, iou_type))
    return states


def random_case(seed: int, iou_type: IouType, images: int = 5, most: int = 8) -> tuple[Json, list[Json]]:
    """Few scores and whole coordinates, so that ties abound; crowds; areas on the limits of the size bins."""
    rng = np.random.default_rng(seed)
    numbers = rng.choice(10**9, images, replace=False).tolist()
    annotations: list[Json] = []
    results: list[Json] = []
    for image_id in numbers:
        for _ in range(int(rng.integers(0, most))):
            box = _box(rng)
            area = float(rng.choice([box[2] * box[3], 1024, 9216, 1023.5, 9216.5, 1e10, 3e10, 50]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.integers(1, 4)),
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(rng.random() < 0.2),
                    "segmentation": _mask(rng, box),
                }
            )
        near = [a["bbox"] for a in annotations if a["image_id"] == image_id]
        for _ in range(int(rng.integers(0, most * 2))):
            box = _jitter(rng, near[int(rng.integers(len(near)))]) if near and rng.random() < 0.8 else _box(rng)
            shape = {"bbox": box} if iou_type == "bbox" else {"segmentation": _mask(rng, box, forms=1)}
            score = float(rng.choice([0.1, 0.3, 0.5, 0.9]))
            category = int(rng.integers(1, 5))
            results.append({"image_id": image_id, "category_id": category, "score": score, **shape})
    targets = {
        "images": [{"id": number, "height": SIZE[0], "width": SIZE[1]} for number in numbers],
        "annotations": annotations,
        "categories": [{"id": number, "name": str(number)} for number in (1, 2, 3)],
        "info": {},
    }
    return targets, results


def _box(rng: np.random.Generator) -> list[float]:
    x, y = rng.integers(0, 60, 2).tolist()
    w, h = rng.choice([1, 4, 16, 32, 48, 100], 2).tolist()
    return [float(x), float(y), float(min(w, SIZE[1] - x)), float(min(h, SIZE[0] - y))]


def _jitter(rng: np.random.Generator, box: list[float]) -> list[float]:
    x, y, w, h = box
    if rng.random() < 0.3:
        return box
    x, y = max(0, x + int(rng.integers(-2, 3))), max(0, y + int(rng.integers(-2, 3)))
    return [x, y, min(max(1.0, w + int(rng.integers(-2, 3))), SIZE[1] - x), min(h, SIZE[0] - y)]


def _mask(rng: np.random.Generator, box: list[float], forms: int = 3) -> Json | list[list[float]]:
    x, y, w, h = (int(value) for value in box)
    # loadRes takes compressed run lengths alone; annotations come as polygons and plain run lengths too.
    form = int(rng.integers(forms))
    if form == 1:
        return [[float(v) for v in (x, y, x, y + h, x + w, y + h, x + w, y)]]
    mask_HW = np.zeros(SIZE, np.uint8, order="F")
    mask_HW[y : y + h, x : x + w] = 1
    mask_HW[y : y + int(h * 0.25 * rng.integers(0, 3)), x : x + w // 2] = 0
    rle = coco_mask.encode(mask_HW)
    if form == 2:
        flat = np.concatenate([[0], mask_HW.ravel(order="F"), [2]])
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        lengths = np.diff(np.concatenate([[0], edges])).tolist()
        return {"size": list(SIZE), "counts": lengths}
    return {"size": list(SIZE), "counts": rle["counts"].decode()}
