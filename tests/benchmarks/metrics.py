"""How fast the dense metrics are, each against something measured in the same run, on one core.

    python tests/benchmarks/metrics.py [--data ../shared/data] [--panopticapi FOLDER] [--boundary-iou-api FOLDER]

panoptic: images per second of `PanopticState.from_segments` against panopticapi's procedure, both on decoded arrays of
COCO size. With --panopticapi (a checkout of cocodataset/panopticapi) that is the official code; else the procedure as
its paper and README publish it, written here: unique pairs of ids, then loops over them. Maps are coco128's where the
data is there, else made here; predictions are the targets, moved and with segments merged.
confusion: `ClassCounts.from_maps` at 1024x2048 with 19 classes against one `np.bincount` over codes that were combined
before the clock started; both for maps of regions and for noise, which is the worst case.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.masks import decode_panoptic_png
from pipeline.metrics.boundary import BoundaryCounts, panoptic_states
from pipeline.metrics.confusion import ClassCounts, Confusion
from pipeline.metrics.panoptic import PanopticState
from pipeline.taxonomy import Category, Taxonomy

REPOSITORY = Path(__file__).resolve().parents[2]
Scene = tuple[Any, list[dict[str, Any]], Any, list[dict[str, Any]]]


def median_s(work: Callable[[], Any], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def shared_data() -> Path | None:
    given = os.environ.get("MASKMILL_SHARED")
    root = Path(given) if given else REPOSITORY.parent / "shared"
    return next((folder for folder in (root / "data", root) if (folder / "coco128").is_dir()), None)


def coco_targets(data: Path, images: int) -> list[tuple[Any, list[dict[str, Any]]]]:
    tree = json.loads((data / "coco128" / "panoptic.json").read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in tree["images"]}
    targets = []
    for annotation in tree["annotations"][:images]:
        width, height = sizes[annotation["image_id"]]
        png = (data / "coco128" / "panoptic" / annotation["file_name"]).read_bytes()
        targets.append((decode_panoptic_png(png, width=width, height=height), annotation["segments_info"]))
    return targets


def made_targets(images: int) -> list[tuple[Any, list[dict[str, Any]]]]:
    """480x640, 12 ragged regions each."""
    rng = np.random.default_rng(0)
    targets = []
    for _ in range(images):
        seeds = rng.random((12, 2)) * (480, 640)
        y, x = np.mgrid[:480, :640]
        wave = 12 * np.sin(x / 9) + 9 * np.cos(y / 7)
        nearest = np.argmin([(y - a + wave) ** 2 + (x - b + wave) ** 2 for a, b in seeds], axis=0)
        ids = rng.choice(np.arange(1, 2**24), 12, replace=False).astype(np.int32)
        segment_HW = ids[nearest]
        targets.append(
            (
                segment_HW,
                [
                    {"id": int(n), "category_id": 1 + at, "area": int((segment_HW == n).sum()), "iscrowd": 0}
                    for at, n in enumerate(ids)
                    if (segment_HW == n).any()
                ],
            )
        )
    return targets


def with_prediction(target_HW: Any, segments: list[dict[str, Any]]) -> Scene:
    pred_HW = np.roll(target_HW, (5, 5), (0, 1))
    pred_HW[target_HW == segments[0]["id"]] = segments[-1]["id"]
    present = set(np.unique(pred_HW).tolist())
    return target_HW, segments, pred_HW, [s for s in segments if s["id"] in present]


def published(scene: Scene) -> dict[int, list[float]]:
    """The published procedure, for one image: {category: [iou_sum, tp, fp, fn]}."""
    target_HW, target_segments, pred_HW, pred_segments = scene
    target = {s["id"]: s for s in target_segments}
    pred = {s["id"]: s for s in pred_segments}
    areas = dict(zip(*(values.tolist() for values in np.unique(pred_HW, return_counts=True)), strict=True))
    codes, pixels = np.unique(target_HW.astype(np.uint64) * 2**24 + pred_HW.astype(np.uint64), return_counts=True)
    shared = {(code >> 24, code & 0xFFFFFF): n for code, n in zip(codes.tolist(), pixels.tolist(), strict=True)}
    sums: dict[int, list[float]] = {}
    found, used = set(), set()
    for (t, p), n in shared.items():
        if t not in target or p not in pred or target[t]["iscrowd"]:
            continue
        if target[t]["category_id"] != pred[p]["category_id"]:
            continue
        iou = n / (areas[p] + target[t]["area"] - n - shared.get((0, p), 0))
        if iou > 0.5:
            entry = sums.setdefault(target[t]["category_id"], [0.0, 0, 0, 0])
            entry[0] += iou
            entry[1] += 1
            found.add(t)
            used.add(p)
    crowds = {}
    for t, row in target.items():
        if row["iscrowd"]:
            crowds[row["category_id"]] = t
        elif t not in found:
            sums.setdefault(row["category_id"], [0.0, 0, 0, 0])[3] += 1
    for p, row in pred.items():
        ignored = shared.get((0, p), 0) + shared.get((crowds.get(row["category_id"], -1), p), 0)
        if p not in used and not ignored / areas[p] > 0.5:
            sums.setdefault(row["category_id"], [0.0, 0, 0, 0])[2] += 1
    return sums


class _Memory:
    """Stands for PIL.Image in the official code, so that it finds decoded arrays where it would open files."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self.open = arrays.__getitem__


def official(module: Any, scenes: list[Scene], *extra: Any) -> Callable[[], Any]:
    """Calls `pq_compute_single_core` of panopticapi or boundary-iou-api over the scenes."""

    def rgb(segment_HW: Any) -> Any:
        return np.stack([segment_HW & 255, segment_HW >> 8 & 255, segment_HW >> 16], -1).astype(np.uint8)

    module.Image = _Memory(
        {f"{side}/{n}": rgb(scene[at]) for n, scene in enumerate(scenes) for side, at in (("target", 0), ("pred", 2))}
    )
    pairs = [
        tuple({"image_id": n, "file_name": str(n), "segments_info": copy.deepcopy(scene[at])} for at in (1, 3))
        for n, scene in enumerate(scenes)
    ]
    categories = {s["category_id"]: {"isthing": 1} for scene in scenes for at in (1, 3) for s in scene[at]}

    def work() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return module.pq_compute_single_core(0, pairs, "target", "pred", categories, *extra)

    return work


def panoptic(scenes: list[Scene], panopticapi: Path | None, boundary_api: Path | None, repeats: int) -> None:
    ids = sorted({s["category_id"] for scene in scenes for at in (1, 3) for s in scene[at]})
    space = Taxonomy("bench", "made here", tuple(Category(n, str(n), "thing", (0, 0, 0)) for n in ids))
    for scene in scenes:
        rows = PanopticState.from_segments(*scene, space).compute(space)["per_class"]
        for category, (iou_sum, *counts) in published(scene).items():
            row = rows[category]
            if [row["tp"], row["fp"], row["fn"]] != counts or abs(row["iou_sum"] - iou_sum) > 1e-9:
                raise SystemExit(f"the two disagree on category {category}: {row} and {iou_sum}, {counts}")

    name = "panopticapi's procedure"
    work: Callable[[], Any] = lambda: [published(scene) for scene in scenes]  # noqa: E731
    if panopticapi:
        sys.path.insert(0, str(panopticapi))
        import panopticapi.evaluation  # type: ignore[import-not-found]

        name, work = "panopticapi", official(panopticapi.evaluation, scenes)
    theirs = len(scenes) / median_s(work, repeats)
    ours = len(scenes) / median_s(lambda: [PanopticState.from_segments(*s, space) for s in scenes], repeats)
    print(f"PQ: {ours:.0f} images/s, {name} {theirs:.0f} images/s: {ours / theirs:.1f}x (wanted of panopticapi: 10)")

    both = len(scenes) / median_s(lambda: [panoptic_states(*s, space) for s in scenes], repeats)
    text = f"PQ and boundary PQ: {both:.0f} images/s"
    if boundary_api:
        sys.path.insert(0, str(boundary_api))
        import boundary_iou.coco_panoptic_api.evaluation as reference  # type: ignore[import-not-found]

        theirs = len(scenes) / median_s(official(reference, scenes, "boundary", 0.02), 1)
        text += f", boundary-iou-api {theirs:.0f} images/s: {both / theirs:.1f} times"
    print(text)


def confusion(repeats: int) -> None:
    rng = np.random.default_rng(0)
    regions = rng.integers(0, 19, (32, 64), np.uint8).repeat(32, 0).repeat(32, 1)
    mistaken = np.roll(regions, (7, 9), (0, 1))
    speckles = rng.random(mistaken.shape) < 0.01
    mistaken[speckles] = rng.integers(0, 19, np.count_nonzero(speckles), np.uint8)
    noise = rng.integers(0, 19, (2, 1024, 2048), np.uint8)
    for name, target_HW, pred_HW in (("regions", regions, mistaken), ("noise", noise[0], noise[1])):
        codes = (target_HW.astype(np.int64) * 19 + pred_HW).ravel()
        single = median_s(lambda codes=codes: np.bincount(codes, minlength=361), repeats)  # type: ignore[misc]
        text = f"{name} 1024x2048, 19 classes: np.bincount {1e3 * single:.2f} ms"
        for state in (ClassCounts, Confusion, BoundaryCounts):
            ours = median_s(
                lambda state=state, a=target_HW, b=pred_HW: state.from_maps(a, b, range(19)),  # type: ignore[misc]
                repeats,
            )
            text += f", {state.__name__} {1e3 * ours:.2f} ms = {ours / single:.2f} times"
        print(text + " (wanted of the first two: at most 2)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed ratios of the dense metrics.")
    parser.add_argument("--data", type=Path, default=shared_data(), help="the folder that has coco128")
    parser.add_argument("--panopticapi", type=Path, help="a checkout of cocodataset/panopticapi")
    parser.add_argument("--boundary-iou-api", type=Path, help="a checkout of bowenc0221/boundary-iou-api; needs OpenCV")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    targets = coco_targets(options.data, options.images) if options.data else made_targets(options.images)
    print(f"{len(targets)} images {'of coco128' if options.data else 'made here'}, numpy {np.__version__}, one thread")
    scenes = [with_prediction(*target) for target in targets]
    panoptic(scenes, options.panopticapi, options.boundary_iou_api, options.repeats)
    confusion(options.repeats)


if __name__ == "__main__":
    main()
