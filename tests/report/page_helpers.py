"""Reports of every kind for the page's tests: real scenes, predictions that are spoilt targets, their exact figures.

The figures come from the metric states; intervals are made up around them, because the page only draws them.
"""

import functools
import html.parser
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.config import DepthScoreConfig, ScenesSource, ScoreConfig
from pipeline.masks import encode_rle, rle_bbox
from pipeline.metrics.boundary import BoundaryCounts
from pipeline.metrics.confusion import Confusion
from pipeline.metrics.depth import RATIO_EDGES, Depth
from pipeline.metrics.detection import RECALLS, Detection
from pipeline.metrics.detection_match import Objects
from pipeline.metrics.panoptic import PanopticState
from pipeline.predictions.base import Found, Predicted
from pipeline.report.gallery import Picture, collect_pictures
from pipeline.sources.base import Sample, read_unit
from pipeline.sources.scenes import Scene, Scenes, render_scene
from pipeline.stages.score import Scorer
from pipeline.taxonomy import Taxonomy, load_taxonomy

IMAGES = 24
WIDTH, HEIGHT = 384, 288
SOURCE = ScenesSource(format="scenes", count=IMAGES, width=WIDTH, height=HEIGHT, unit_images=8, seed=3)
TAXONOMY = load_taxonomy("scenes")
FIGURES = {
    "labels": "semantic.mIoU",
    "panoptic": "panoptic.All.PQ",
    "objects": "detection.segm.AP",
    "depth": "depth.AbsRel",
}
TASKS = {"labels": "semantic", "panoptic": "panoptic", "objects": "instance", "depth": "depth"}


def smooth_noise(draw: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Values of about -1 to 1 that change slowly, (H, W)."""
    coarse = draw.normal(size=(cells + 1, cells + 1))
    rows, columns = np.linspace(0, cells, height, endpoint=False), np.linspace(0, cells, width, endpoint=False)
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None], columns - left
    upper = coarse[top][:, left] * (1 - right) + coarse[top][:, left + 1] * right
    lower = coarse[top + 1][:, left] * (1 - right) + coarse[top + 1][:, left + 1] * right
    return upper * (1 - down) + lower * down


def warp(draw: np.random.Generator, map_HW: np.ndarray, pixels: float) -> np.ndarray:
    """The map with its borders pushed around by a few pixels."""
    height, width = map_HW.shape
    rows, columns = np.indices(map_HW.shape)
    rows = rows + np.rint(smooth_noise(draw, height, width, 12) * pixels).astype(int)
    columns = columns + np.rint(smooth_noise(draw, height, width, 12) * pixels).astype(int)
    return map_HW[rows.clip(0, height - 1), columns.clip(0, width - 1)]


def spoil_segments(draw: np.random.Generator, scene: Scene) -> tuple[np.ndarray, list[dict[str, Any]], float]:
    """A panoptic prediction: borders moved, some things missed, merged into stuff or called something else."""
    harm = float(draw.beta(1.3, 3))
    segment_HW = warp(draw, scene.segment_HW, 0.5 + 4 * harm)
    category = {segment.id: segment.category_id for segment in scene.segments}
    stuff = [identifier for identifier, kind in category.items() if kind < 5]
    for identifier, kind in list(category.items()):
        inside_HW = segment_HW == identifier
        if kind >= 5 and draw.random() < 0.1 + 0.4 * harm:
            segment_HW[inside_HW] = stuff[int(draw.integers(len(stuff)))]
        elif kind in (6, 7) and draw.random() < 0.25 * harm:
            category[identifier] = 13 - kind
    patch_HW = smooth_noise(draw, *segment_HW.shape, 5) > 2.2 - 1.6 * harm
    for kind, other in ((3, 2), (4, 1)):  # pavement taken for road, vegetation for building
        from_id, to_id = (next((i for i, k in category.items() if k == wanted), None) for wanted in (kind, other))
        if from_id and to_id:
            segment_HW[patch_HW & (segment_HW == from_id)] = to_id
    ids = np.unique(segment_HW[segment_HW != 0]).tolist()
    return segment_HW, [{"id": identifier, "category_id": category[identifier]} for identifier in ids], harm


def predict(kind: str, index: int) -> Predicted:
    """What a middling model would say of scene `index`."""
    draw = np.random.default_rng([7, index])
    scene = render_scene(index, seed=SOURCE.seed, width=WIDTH, height=HEIGHT)
    if kind == "depth":
        factor = np.exp(0.16 * smooth_noise(draw, HEIGHT, WIDTH, 6) + 0.09 * draw.normal() + 0.03)
        depth_HW = np.where(scene.depth_HW == 0, 60.0, scene.depth_HW) * factor
        depth_HW[:, : 6 if index % 12 == 5 else 0] = np.nan
        return Predicted(depth_HW=warp(draw, depth_HW, 2), depth_kind="metric_m")
    segment_HW, segments, _ = spoil_segments(draw, scene)
    if kind == "panoptic":
        return Predicted(segment_HW=segment_HW, segments=tuple(segments))
    category = {segment["id"]: segment["category_id"] for segment in segments}
    if kind == "labels":
        label_HW = np.full(segment_HW.shape, TAXONOMY.void_id, np.uint8)
        for identifier, kind_id in category.items():
            label_HW[segment_HW == identifier] = kind_id
        fill_HW = scene.semantic_HW.copy()
        fill_HW[fill_HW == TAXONOMY.void_id] = 1
        return Predicted(label_HW=np.where(label_HW == TAXONOMY.void_id, fill_HW, label_HW))
    return Predicted(objects=spoil_objects(draw, segment_HW, category))


def spoil_objects(draw: np.random.Generator, segment_HW: np.ndarray, category: Mapping[int, int]) -> Objects:
    """Instances with scores that say something about whether they are right, and a few that are nothing."""
    results = []
    for identifier, kind in category.items():
        inside_HW = segment_HW == identifier
        if kind >= 5 and inside_HW.sum() > 20:
            results.append((kind, inside_HW, draw.beta(6, 2)))
    for _ in range(int(draw.integers(0, 4))):
        top, left = int(draw.integers(0, HEIGHT - 30)), int(draw.integers(0, WIDTH - 40))
        inside_HW = np.zeros(segment_HW.shape, bool)
        inside_HW[top : top + int(draw.integers(8, 30)), left : left + int(draw.integers(6, 40))] = True
        results.append((int(draw.integers(5, 8)), inside_HW, draw.beta(2.5, 3)))
    size = {"width": WIDTH, "height": HEIGHT}
    rles = [encode_rle(inside_HW) for _, inside_HW, _ in results]
    return Objects(
        height=HEIGHT,
        width=WIDTH,
        category_id=np.array([kind for kind, _, _ in results], np.int64),
        bbox_N4=np.array([rle_bbox(rle, **size) for rle in rles], np.float64).reshape(-1, 4),
        segmentation=[{"size": [HEIGHT, WIDTH], "counts": rle} for rle in rles],
        score=np.array([score for _, _, score in results], np.float64),
    )


def samples() -> Iterator[tuple[Sample, int]]:
    """Every sample of the source with its number."""
    source = Scenes(SOURCE)
    index = 0
    for unit in source.plan():
        for item in read_unit(source, unit, ()):
            if isinstance(item, Sample):
                yield item, index
                index += 1


def scorer(**options: Any) -> Scorer:
    config = ScoreConfig(depth=DepthScoreConfig(max_depth=65.0), **options)
    return Scorer.build(config, TAXONOMY, TAXONOMY, max_pixels=10**7)


@functools.cache
def scores(kind: str) -> list[dict[str, Any]]:
    """The SCORE value of each image."""
    found = scorer()
    values = []
    for sample, index in samples():
        value = found.score(predict(kind, index), sample.targets, key=sample.image_id)
        assert value is not None
        assert "error_type" not in value, value
        values.append(value | {"image_id": sample.image_id, "shard_id": sample.shard_id, "position": sample.position})
    return values


def merged(states: Sequence[Any]) -> Any:
    total = states[0]
    for state in states[1:]:
        total = total.merge(state)
    return total


def plain(value: Any) -> Any:
    """As report.json holds it: NaN is null, keys are text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def named(per_class: Mapping[Any, Any], taxonomy: Taxonomy = TAXONOMY) -> dict[str, Any]:
    return {str(key): {"name": taxonomy.by_id[int(key)].name, **row} for key, row in per_class.items()}


def sections(kind: str, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metric sections of a report over some images."""
    if kind == "labels":
        confusion = merged([Confusion.from_row(value["confusion"]) for value in values])
        boundary = merged([BoundaryCounts.from_row(value["boundary"]) for value in values]).compute(TAXONOMY)
        semantic = confusion.compute()
        semantic["per_class"] = named(semantic["per_class"])
        boundary["per_class"] = named(boundary["per_class"])
        names = [TAXONOMY.by_id[identifier].name for identifier in confusion.ids]
        semantic["confusion"] = {"ids": list(confusion.ids), "names": names, "matrix": confusion.matrix}
        return {"semantic": semantic, "boundary": boundary}
    if kind == "panoptic":
        found = {}
        for name in ("panoptic", "boundary_panoptic"):
            figures = merged([PanopticState.from_row(value[name]) for value in values]).compute(TAXONOMY)
            rows = named(figures["per_class"])
            for key, row in rows.items():
                row["kind"] = TAXONOMY.by_id[int(key)].kind
            found[name] = figures | {"per_class": rows}
        return found
    if kind == "objects":
        return {"detection": {name: detection(values, name) for name in ("bbox", "segm")}}
    state = merged([Depth.from_row(value["depth"]) for value in values])
    threshold, share = state.delta_curve()
    counts = {
        name: getattr(state, name)
        for name in ("images", "pixels", "pixels_without_prediction", "images_without_evidence")
    }
    return {
        "depth": state.compute()
        | counts
        | {
            "per_pixel": state.compute_pixels(),
            "histogram": {
                "edges": RATIO_EDGES,
                "counts": state.log_ratio[1:-1],
                "below": state.log_ratio[0],
                "above": state.log_ratio[-1],
            },
            "delta_curve": {"threshold": threshold, "share": share},
        }
    }


def detection(values: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    state = merged([Detection.from_row(value[name]) for value in values])
    found = state.compute()
    per_class = found.per_category()
    rows = {key: row | {"targets": found.target_count[at]} for at, (key, row) in enumerate(per_class.items())}
    precision_TR = np.nanmean(found.precision_STKR[0], axis=1)
    edges = np.linspace(0, 1, 21)
    true = (state.matched & 1).astype(bool)
    counted = (state.ignored & 1) == 0
    return found.figures() | {
        "per_class": named(rows),
        "pr_curve": {
            "recall": RECALLS,
            "precision": {"0.5": precision_TR[0], "0.75": precision_TR[5], "mean": precision_TR.mean(axis=0)},
        },
        "scores": {
            "edges": edges,
            "tp": np.histogram(state.score[true & counted], edges)[0],
            "fp": np.histogram(state.score[~true & counted], edges)[0],
        },
    }


def look_up(tree: Mapping[str, Any], path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


def image_values(kind: str) -> list[float]:
    """The figure of each image alone."""
    return [float(look_up(sections(kind, [value]), FIGURES[kind])) for value in scores(kind)]


def make_report(kind: str) -> dict[str, Any]:
    """A whole report of one kind: labels, panoptic, objects or depth."""
    values = scores(kind)
    found = plain(sections(kind, values))
    figure = FIGURES[kind]
    by_image = image_values(kind)
    order = sorted(range(len(values)), key=lambda at: (by_image[at], at), reverse=kind == "depth")
    entries = [
        {key: values[at][key] for key in ("image_id", "shard_id", "position")} | {"value": by_image[at]} for at in order
    ]
    counts, edges = np.histogram([value for value in by_image if not math.isnan(value)], 12)
    return (
        common(kind)
        | found
        | {
            "intervals": {path: interval(found, path) for path in headlines(kind)},
            "bootstrap": {"replicates": 1000, "level": 0.95, "method": "Poisson bootstrap over images"},
            "sizes": {"edges": [0.1, 0.105, 0.11025, 0.1158], "counts": [2, IMAGES, 2], "unit": "megapixels"},
            "image_figures": {figure: {"edges": edges.tolist(), "counts": counts.tolist()}},
            "worst": {figure: entries[:4]},
            "best": {figure: entries[-4:][::-1]},
            "slices": {
                "by": "city",
                "values": [slice_of(kind, name, at) for at, name in enumerate(("Aachen", "Bochum", "Ulm"))],
            },
        }
    )


def headlines(kind: str) -> list[str]:
    return {
        "labels": ["semantic.mIoU", "semantic.mIoU_present", "semantic.fwIoU", "semantic.pixel_accuracy",
                   "semantic.mean_accuracy", "semantic.dice", "boundary.mIoU"],
        "panoptic": ["panoptic.All.PQ", "panoptic.Things.PQ", "panoptic.Stuff.PQ", "boundary_panoptic.All.PQ"],
        "objects": ["detection.segm.AP", "detection.bbox.AP", "detection.segm.AP50", "detection.bbox.AP50"],
        "depth": ["depth.AbsRel", "depth.RMSE", "depth.SILog", "depth.delta1"],
    }[kind]  # fmt: skip


def interval(found: Mapping[str, Any], path: str) -> list[float]:
    value = look_up(found, path)
    return [value * 0.965, value * 1.031]


def slice_of(kind: str, name: str, at: int) -> dict[str, Any]:
    own = scores(kind)[at * 8 : at * 8 + 8]
    found = plain(sections(kind, own))
    return {"value": name, "counts": {"images": 8 + (at == 1), "ok": 8, "failed": int(at == 1)}, **found}


def common(kind: str) -> dict[str, Any]:
    """The run, and images that have no figures."""
    options = ScoreConfig(depth=DepthScoreConfig(max_depth=65.0))
    return {
        "format": 1,
        "model": {
            "label": "unet_small",
            "version": "9f3b1c20a7d4",
            "task": TASKS[kind],
            "taxonomy": "scenes",
            "score_taxonomy": "scenes",
            "mapping": None,
            "license": "Apache-2.0",
            "parameters": 1_947_208,
        },
        "run": {
            "run_id": "20260301T094512-5c1e",
            "job": "label",
            "state": "done",
            "started_at": "2026-03-01T09:45:12+00:00",
            "updated_at": "2026-03-01T09:47:31+00:00",
            "config": {
                "source": SOURCE.model_dump(mode="json"),
                "score": options.model_dump(mode="json"),
                "models": [{"name": "unet_small", "weights": "bundled:unet_small_scenes"}],
            },
            "code": {"maskmill": "0.1.0", "commit": "2684d6d", "python": "3.11.9", "torch": "2.15.0"},
            "source": {"units": 3, "size_bytes": 2_345_678, "fingerprint": "c0ffee1234567890"},
            "images": IMAGES + 4,
            "seconds": {"read": 1.2, "decode": 2.9, "prepare": 3.3, "predict": 21.4, "encode": 4.1, "score": 6.7},
            "label_s": 19.6,
        },
        "counts": {"images": IMAGES + 4, "ok": IMAGES, "failed": 2, "missing_target": 1, "missing_prediction": 1},
        "problems": [
            problem("failed", "CorruptImageError", "decode", ["expected a whole image, got 1,024 of 40,311 bytes",
                                                              "expected an encoded image, got 0 bytes"]),
            problem("missing_target", "MissingTargetError", "score", ["the source has no target of this image"]),
            problem("missing_prediction", "MissingPredictionError", "score", ["no prediction of this image"]),
        ],
    }  # fmt: skip


def problem(outcome: str, name: str, stage: str, messages: Sequence[str]) -> dict[str, Any]:
    examples = [{"image_id": f"scenes/{name}/{at:09d}", "message": text} for at, text in enumerate(messages)]
    return {"outcome": outcome, "type": name, "stage": stage, "count": len(messages), "examples": examples}


def make_pictures(kind: str, report: Mapping[str, Any]) -> dict[str, list[Picture]]:
    """The worst and best images of a report, drawn from the source."""
    numbers = {sample.image_id: (sample, index) for sample, index in samples()}
    pictures = {}
    for end in ("worst", "best"):
        entries = report[end][FIGURES[kind]]

        def find(sample: Sample) -> Found:
            return Found(
                name=sample.image_id, predicted=predict(kind, numbers[sample.image_id][1]), width=WIDTH, height=HEIGHT
            )

        own = ((numbers[entry["image_id"]][0], place) for place, entry in enumerate(entries))
        pictures[f"{end}:{FIGURES[kind]}"] = collect_pictures(entries, own, find, scorer(boundary=False))
    return pictures


def wide_report(classes: int = 150) -> dict[str, Any]:
    """A semantic report of many classes, some of them without evidence."""
    draw = np.random.default_rng(5)
    taxonomy = load_taxonomy("ade20k150")
    ids = taxonomy.ids[:classes]
    size = np.exp(draw.normal(9, 2.2, len(ids))).astype(np.int64)
    size[-7:] = 0
    likely = np.exp(draw.normal(0, 2.0, (len(ids), len(ids) + 1)))
    likely[np.arange(len(ids)), np.arange(len(ids))] += likely.sum(axis=1) * draw.beta(4, 2, len(ids)) * 3
    likely[:, -8:-1] = 0
    matrix = np.array([draw.multinomial(n, row / row.sum()) for n, row in zip(size, likely, strict=True)], np.int64)
    confusion = Confusion(tuple(ids), matrix)
    semantic = confusion.compute()
    semantic["per_class"] = named(semantic["per_class"], taxonomy)
    semantic["confusion"] = {"ids": list(ids), "names": [taxonomy.by_id[i].name for i in ids], "matrix": matrix}
    found = plain({"semantic": semantic})
    report = common("labels") | found
    report["intervals"] = {"semantic.mIoU": interval(found, "semantic.mIoU")}
    return report


def empty_report() -> dict[str, Any]:
    """A run of which nothing could be scored: figures are null, most sections are absent."""
    report = common("labels")
    nothing = dict.fromkeys(("mIoU", "mIoU_present", "fwIoU", "pixel_accuracy", "mean_accuracy", "dice"))
    row = dict.fromkeys(("IoU", "dice", "accuracy")) | {"name": "sky", "intersection": 0, "target": 0, "pred": 0}
    report["semantic"] = nothing | {"n": 0, "n_present": 0, "n_without_evidence": 1, "per_class": {"0": row}}
    report["counts"] = {"images": 4, "ok": 0, "failed": 4, "missing_target": 0, "missing_prediction": 0}
    return report


PALETTE = {category.id: category.color for category in TAXONOMY.categories}

VOID_TAGS = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Tags(html.parser.HTMLParser):
    """Open tags, ids, links, and text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute twice in {tag}: {attrs}"
        assert not [name for name in found if name.startswith("on") or name == "style"], attrs
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [found["href"] or ""] if "href" in found else []
        self.loads += [found[name] or "" for name in ("src", "srcset", "data", "action", "xlink:href") if name in found]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)
