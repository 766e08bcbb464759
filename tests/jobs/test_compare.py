"""`maskmill compare` without targets: one model held against the other, once, and what comes of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import page_helpers
import pyarrow.parquet as pq
import pytest
from compare_helpers import write_predictions
from job_helpers import rows_of, run_label

from jobs import compare
from pipeline.dataflow import cluster
from pipeline.masks import decode_label_map
from pipeline.metrics.panoptic import PanopticState
from pipeline.predictions.base import Predicted
from pipeline.sources.scenes import render_scene
from pipeline.taxonomy import Category, Taxonomy

SCENES = ("source.format=scenes", "source.count=12", "source.unit_images=5", "source.width=96", "source.height=64")
TWO = (
    "models.0.name=unet_small",
    "models.0.weights=bundled:unet_small_scenes",
    "models.1.name=unet_small",
    "models.1.label=coarse",
    "models.1.weights=bundled:unet_small_scenes",
    "models.1.options.resize=40",
)
LABELS = ("unet_small", "coarse")


def run_compare(*arguments: object) -> int:
    return compare.main([*map(str, arguments), "--bootstrap", "40", "--images", "3"])


def compared(capsys: Any, *arguments: object) -> dict[str, Any]:
    assert run_compare(*arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 scenes, two models, no scores."""
    folder = tmp_path_factory.mktemp("labelled")
    small = ("resources.torch_threads=1", "resources.decode_threads=2", "output.rows_per_file=3")
    assert run_label(*SCENES, *TWO, *small, "score=null", f"output.uri={folder}") == 0
    return folder


def iou(a_NHW: Any, b_NHW: Any, classes: int = 8) -> tuple[float, np.ndarray]:
    pairs = np.zeros((256, 256), np.int64)
    np.add.at(pairs, (a_NHW.ravel(), b_NHW.ravel()), 1)
    both = np.diag(pairs)[:classes]
    union = pairs.sum(0)[:classes] + pairs.sum(1)[:classes] - both
    return float((both[union > 0] / union[union > 0]).mean()), both


def test_agreement_of_two_models_of_one_table(labelled: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_compare(labelled, labelled, "--models", *LABELS, "--json") == 0
    out, error = capsys.readouterr()
    assert "no scores in A and B; so B is held against A" in error
    found = json.loads(out)
    folder = labelled / "_compare"
    assert json.loads((folder / "compare.json").read_text()) == found
    maps = {
        label: np.stack([
            decode_label_map(row["semantic"]["data"], "png", width=96, height=64)
            for row in rows_of(labelled)
            if row["model"] == label
        ])
        for label in LABELS
    }  # fmt: skip
    expected, both = iou(*maps.values())
    assert 0.3 < expected < 0.999
    semantic = found["agreement"]["semantic"]
    assert semantic["mIoU"] == pytest.approx(expected, abs=1e-12)
    assert [row["intersection"] for row in semantic["per_class"].values()] == both.tolist()
    low, high = found["agreement"]["intervals"]["semantic.mIoU"]
    assert low < expected < high
    assert found["agreement"]["counts"]["ok"] == 12
    by_image = {
        row["image_id"]: iou(a, b)[0]
        for row, a, b in zip([r for r in rows_of(labelled) if r["model"] == "coarse"], *maps.values(), strict=True)
    }
    ranked = sorted(by_image, key=lambda name: (by_image[name], name))
    listed = found["disagreement"]["semantic.mIoU"]
    assert [entry["image_id"] for entry in listed] == ranked[:3]
    assert [entry["value"] for entry in listed] == pytest.approx([by_image[name] for name in ranked[:3]])
    written = {r["image_id"]: r["semantic_mIoU"] for r in pq.read_table(folder / "images.parquet").to_pylist()}
    assert written == pytest.approx(by_image)
    page = (folder / "index.html").read_text()
    assert "agreement of two models" in page
    assert page.count("data:image/webp") == 3 * 4
    assert {"name": "model.label", "a": "unet_small", "b": "coarse"} in found["settings"]
    assert {"name": "model.config.options.resize", "a": None, "b": "40"} in found["settings"]

    # Nothing is left to score: the same again, without Ray.
    before = (folder / "compare.json").read_bytes()

    def refuse(*_: object) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(cluster, "connect", refuse)
    assert run_compare(labelled, labelled, "--models", *LABELS) == 0
    out = capsys.readouterr().out
    assert "least agreement" in out
    assert f"page: {folder}/index.html" in out
    assert (folder / "compare.json").read_bytes() == before
    # Other things do not go into the same folder.
    assert run_compare(labelled, labelled, "--models", *reversed(LABELS)) == 2
    assert "holds scores of something else: its source.model is 'unet_small', not 'coarse'" in capsys.readouterr().err


def test_agreement_is_symmetric(labelled: Path, tmp_path: Path, capsys: Any) -> None:
    there = compared(capsys, labelled, labelled, "--models", *LABELS, "--out", tmp_path / "there", "--no-page")
    back = compared(capsys, labelled, labelled, "--models", *reversed(LABELS), "--out", tmp_path / "back", "--no-page")
    a, b = (found["agreement"]["semantic"] for found in (there, back))
    assert a["mIoU"] == b["mIoU"]
    assert {key: row["IoU"] for key, row in a["per_class"].items()} == {
        key: row["IoU"] for key, row in b["per_class"].items()
    }
    assert a["confusion"]["matrix"][0][1] == b["confusion"]["matrix"][1][0]
    assert there["agreement"]["intervals"]["semantic.mIoU"] == back["agreement"]["intervals"]["semantic.mIoU"]
    assert there["disagreement"]["semantic.mIoU"] == back["disagreement"]["semantic.mIoU"]
    assert not (tmp_path / "back" / "index.html").exists()


def with_void(predicted: Predicted) -> Predicted:
    assert predicted.label_HW is not None
    label_HW = predicted.label_HW.copy()
    label_HW[:20] = page_helpers.TAXONOMY.void_id
    return Predicted(label_HW=label_HW)


@pytest.mark.parametrize("kind", ["labels", "panoptic", "depth"])
def test_a_model_held_against_the_truth_scores_as_with_targets(kind: str, tmp_path: Path, capsys: Any) -> None:
    """A says what the targets are, so that agreement with it is what B's scores against them come to."""
    a = write_predictions(tmp_path / "a", kind, perfect=True, failing=[3])
    b = write_predictions(tmp_path / "b", kind, label="other", failing=[5])
    found = compared(capsys, a, b, "score.depth.max_depth=65", "--out", tmp_path / "out")
    agreement = found["agreement"]
    counts = {"images": 16, "ok": 14, "failed": 1, "missing_target": 1, "missing_prediction": 0}
    assert agreement["counts"] == counts
    images = [index for index in range(16) if index not in (3, 5)]
    # Depth has been rounded to 16 bits on both sides.
    expected = pytest.approx(against_truth(kind, images), abs=1e-3 if kind == "depth" else 1e-12)
    assert page_helpers.look_up(agreement, page_helpers.FIGURES[kind]) == expected
    assert (tmp_path / "out" / "index.html").read_text().count("data:image/webp") == 3 * 4
    assert found["warnings"] == []


def against_truth(kind: str, images: list[int]) -> float:
    if kind != "panoptic":
        scores = page_helpers.scores(kind)
        sections = page_helpers.sections(kind, [scores[index] for index in images])
        return float(page_helpers.look_up(sections, page_helpers.FIGURES[kind]))
    state = PanopticState.empty()
    for index in images:
        size = {"width": page_helpers.WIDTH, "height": page_helpers.HEIGHT}
        scene, pred = render_scene(index, seed=page_helpers.SOURCE.seed, **size), page_helpers.predict(kind, index)
        # A table knows no crowds.
        segments = [{"id": segment.id, "category_id": segment.category_id} for segment in scene.segments]
        assert pred.segment_HW is not None
        state = state.merge(
            PanopticState.from_segments(
                scene.segment_HW, segments, pred.segment_HW, pred.segments, page_helpers.TAXONOMY
            )
        )
    return float(state.compute(page_helpers.TAXONOMY)["All"]["PQ"])


def every_second(predicted: Predicted) -> Predicted:
    objects = predicted.objects
    assert objects is not None
    assert objects.bbox_N4 is not None
    assert objects.segmentation is not None
    assert objects.score is not None
    return Predicted(
        objects=dataclasses.replace(
            objects,
            category_id=objects.category_id[::2],
            bbox_N4=objects.bbox_N4[::2],
            segmentation=objects.segmentation[::2],
            score=objects.score[::2],
        )
    )


def test_objects_that_one_model_finds_and_the_other_does_not(tmp_path: Path, capsys: Any) -> None:
    a = write_predictions(tmp_path / "a", "objects", images=10, change=every_second)
    b = write_predictions(tmp_path / "b", "objects", images=10, label="other")
    found = compared(capsys, a, b, "--out", tmp_path / "out")
    for kind in ("bbox", "segm"):
        detection = found["agreement"]["detection"][kind]
        assert detection["AR100"] == 1
        assert 0.3 < detection["AP"] < 1
    rows = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    sizes = {sample.image_id: len(page_helpers.predict("objects", n).objects) for sample, n in page_helpers.samples()}  # type: ignore[arg-type]
    assert len(rows) == 10
    for row in rows:
        every, half = sizes[row["image_id"]], -(-sizes[row["image_id"]] // 2)
        counts = [row[f"detection_segm_{name}"] for name in ("tp", "fp", "fn")]
        assert counts == [half, every - half, 0]
        assert row["detection_segm_F1"] == (pytest.approx(2 * half / (half + every)) if every else None)


def test_void_is_left_out(tmp_path: Path, capsys: Any) -> None:
    a = write_predictions(tmp_path / "a", "labels", change=with_void, images=8)
    b = write_predictions(tmp_path / "b", "labels", images=8, label="whole")
    there = compared(capsys, a, b, "--out", tmp_path / "there", "--no-page")["agreement"]["semantic"]
    assert there["mIoU"] == 1
    back = compared(capsys, b, a, "--out", tmp_path / "back", "--no-page")["agreement"]["semantic"]
    assert back["mIoU"] < 1  # where the target says something, void is wrong


def scaled(kind: str) -> Any:
    def change(predicted: Predicted) -> Predicted:
        depth_HW = predicted.depth_HW
        assert depth_HW is not None
        depth_HW = 3 / depth_HW if kind == "inverse_relative" else (depth_HW - 1) / 7
        return dataclasses.replace(predicted, depth_HW=depth_HW, depth_kind=kind)

    return change


@pytest.mark.parametrize(
    ("kind", "alignment"), [("relative", "least_squares"), ("inverse_relative", "least_squares_disparity")]
)
def test_depth_of_another_kind_is_fitted(kind: str, alignment: str, tmp_path: Path, capsys: Any) -> None:
    a = write_predictions(tmp_path / "a", "depth", images=8)
    b = write_predictions(tmp_path / "b", "depth", images=8, change=scaled(kind), label="other")
    found = compared(capsys, a, b, "score.depth.max_depth=100", "--out", tmp_path / "out", "--no-page")
    assert found["score"]["depth"]["alignment"] == alignment
    assert found["agreement"]["depth"]["AbsRel"] < 0.01  # the same depth in another unit
    assert found["warnings"] == [
        f"Depth is metric_m in A and {kind} in B (alignment: {alignment}); what has a unit is in that of A."
    ]
    found = compared(
        capsys, a, b, "score.depth.max_depth=100", "score.depth.alignment=none", "--out", tmp_path / "x", "--no-page"
    )
    assert found["agreement"]["depth"]["AbsRel"] > 0.3


OTHER = Taxonomy(
    "other",
    "made here",
    (
        Category(1, "person", "thing", (200, 0, 0)),
        Category(2, "car", "thing", (0, 0, 200)),
        Category(9, "tower", "stuff", (9, 9, 9)),
    ),
)


def in_other(predicted: Predicted) -> Predicted:
    """Cars and persons by their ids in OTHER, everything else a tower."""
    assert predicted.label_HW is not None
    names = {category.id: category.name for category in page_helpers.TAXONOMY.categories}
    ids = {category.name: category.id for category in OTHER.categories}
    table = np.array([ids.get(names.get(identifier, ""), 9) for identifier in range(256)], np.uint8)
    return Predicted(label_HW=table[predicted.label_HW])


def test_other_label_spaces_are_mapped(tmp_path: Path, capsys: Any) -> None:
    a = write_predictions(tmp_path / "a", "labels", images=6)
    b = write_predictions(tmp_path / "b", "labels", images=6, change=in_other, taxonomy=OTHER, label="other")
    found = compared(capsys, a, b)
    assert (found["taxonomy"], found["mapping"]["source"]) == ("scenes", "other")
    assert found["mapping"]["mapped"] == {"car": "car", "person": "person"}
    unmapped, unused = found["warnings"]
    assert unmapped == "Classes of B that A does not have count as void: tower."
    assert unused.startswith("No class of B counts as these of A, which so agree nowhere: sky,")
    by_name = {row["name"]: row["IoU"] for row in found["agreement"]["semantic"]["per_class"].values()}
    assert (by_name["car"], by_name["person"], by_name["sky"]) == (1, 1, 0)
    page = (tmp_path / "b" / "_compare" / "index.html").read_text()
    assert "B&#39;s classes (other) are mapped into A&#39;s (scenes)" in page
    # Agreement is of predictions: a table of scores has none.
    assert run_compare(a, tmp_path / "b" / "_compare" / "_scores", "--agreement") == 2
    assert "holds scores and no predictions" in capsys.readouterr().err


def test_nothing_in_common(tmp_path: Path, capsys: Any) -> None:
    a = write_predictions(tmp_path / "a", "labels", images=4)
    b = write_predictions(tmp_path / "b", "depth", images=4, label="other")
    assert run_compare(a, b) == 3
    assert "no image could be scored" in capsys.readouterr().err
