"""COCO results: the official figures, the rules of loadRes, files that are none, results that fit no image."""

import json
import re
import tracemalloc
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detection_oracle import FIGURES, coco_eval
from prediction_helpers import find_all, fingerprints, score_all, sections

from pipeline.config import ScoreConfig
from pipeline.errors import ConfigError, PredictError, StorageError
from pipeline.masks import encode_rle
from pipeline.metrics.detection import Detection
from pipeline.metrics.detection_match import IouType
from pipeline.predictions.base import Found
from pipeline.sources.coco import categories_of
from pipeline.stages.score import Scorer
from pipeline.taxonomy import Taxonomy

MASK_HW = np.zeros((8, 10), bool)
MASK_HW[2:6, 1:5] = True
RLE = {"size": [8, 10], "counts": encode_rle(MASK_HW)}
BOX = [1, 2, 4, 4]
TARGET = {"category_id": 1, "bbox": BOX, "area": 16, "segmentation": RLE, "iscrowd": 0}
RESULT = {"image_id": 1, "category_id": 1, "bbox": BOX, "score": 0.5}


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Any]:
    """Images 1, 2 and 3, the first two with an object each."""
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 10, "height": 8} for n in (1, 2, 3)]
    annotations = [{"id": n, "image_id": n, **TARGET} for n in (1, 2)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "targets.json").write_text(json.dumps(tree))
    return {"format": "coco", "instances": tmp_path / "targets.json"}


@pytest.fixture
def predictions(tmp_path: Path) -> dict[str, Any]:
    return {"format": "coco", "uri": tmp_path / "results.json"}


def write(predictions: dict[str, Any], results: Any) -> None:
    predictions["uri"].write_text(results if isinstance(results, str) else json.dumps(results))


def taxonomy_of(source: dict[str, Any]) -> Taxonomy:
    taxonomy = categories_of(sections(source, {"uri": "x"})[0])
    assert taxonomy is not None
    return taxonomy


def found_by_id(source: dict[str, Any], predictions: dict[str, Any], results: Any) -> dict[str, Found]:
    write(predictions, results)
    return {found.name: found for _, found in find_all(source, predictions)[0] if found is not None}


def figures(scores: list[dict[str, Any]], kind: IouType) -> dict[str, float]:
    return reduce(Detection.merge, (Detection.from_row(score[kind]) for score in scores)).compute().figures()


def official(path: Path, kind: str) -> list[float]:
    """The 12 figures of one kind in expected.txt."""
    text = path.read_text().partition(f"type={kind}")[2]
    return [float(value) for value in re.findall(r"= (-?[\d.]+)$", text, re.MULTILINE)[:12]]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("file", "kind", "ap"),
    [("bbox", "bbox", 0.5045806987), ("segm", "segm", 0.3195452759), ("segm", "bbox", None)],
)
def test_official_figures(shared_data: Path, file: str, kind: IouType, ap: float | None) -> None:
    root = shared_data / "coco_ap"
    targets, results = root / "instances_val2014_100.json", root / f"instances_val2014_fake{file}100_results.json"
    source = {"format": "coco", "instances": targets, "unit_images": 7}
    pairs, names = find_all(source, {"format": "coco", "uri": results})
    ours = figures(score_all(pairs, taxonomy_of(source)), kind)
    theirs = coco_eval(json.loads(targets.read_text()), json.loads(results.read_text()), kind).stats
    assert [ours[name] for name in FIGURES] == pytest.approx(list(theirs), abs=1e-9)
    assert names == []
    if ap is not None:
        assert ours["AP"] == pytest.approx(ap, abs=1e-10)
        assert [ours[name] for name in FIGURES] == pytest.approx(official(root / "expected.txt", kind), abs=5.01e-4)


def test_an_image_without_results_is_a_prediction_of_no_objects(
    source: dict[str, Any], predictions: dict[str, Any]
) -> None:
    write(predictions, [RESULT])
    pairs, _ = find_all(source, predictions)
    assert [(sample.image_id, len(found.predicted.objects)) for sample, found in pairs] == [  # type: ignore[union-attr, arg-type]
        ("1.jpg", 1), ("2.jpg", 0), ("3.jpg", 0),
    ]  # fmt: skip
    scores = score_all(pairs, taxonomy_of(source))
    assert [set(score) for score in scores] == [{"bbox"}] * 3  # boxes are no masks, nowhere
    assert figures(scores, "bbox")["AR100"] == 0.5


@pytest.mark.parametrize("boxed", [True, False])
def test_the_first_result_decides_for_the_whole_file(
    source: dict[str, Any], predictions: dict[str, Any], boxed: bool
) -> None:
    box = {"bbox": [0, 0, 10, 8]} if boxed else {"bbox": []}
    result = {**RESULT, **box, "segmentation": RLE}
    write(predictions, [result])
    pairs, _ = find_all(source, predictions)
    objects = pairs[0][1].predicted.objects  # type: ignore[union-attr]
    assert objects is not None
    assert objects.shapes("segm")[1].tolist() == [80 if boxed else 16]
    assert objects.shapes("bbox")[1].tolist() == [80 if boxed else 16]
    scores = score_all(pairs, taxonomy_of(source))
    assert [set(score) for score in scores] == [{"bbox", "segm"}] * 3
    targets = json.loads(source["instances"].read_text())
    given = [{key: value for key, value in result.items() if value != []}]
    for kind in ("bbox", "segm"):
        theirs = np.array(coco_eval(targets, given, kind).stats)
        ours = [figures(scores, kind)[name] for name in FIGURES]
        np.testing.assert_allclose(ours, np.where(theirs == -1, np.nan, theirs), atol=1e-12)


def test_an_empty_file_is_boxes_that_found_nothing(source: dict[str, Any], predictions: dict[str, Any]) -> None:
    write(predictions, [])
    pairs, names = find_all(source, predictions)
    assert [set(score) for score in score_all(pairs, taxonomy_of(source))] == [{"bbox"}] * 3
    assert names == []


def test_an_object_with_annotations_and_ids_as_text(source: dict[str, Any], predictions: dict[str, Any]) -> None:
    results = [RESULT, {**RESULT, "image_id": "2", "score": 1}]
    here = found_by_id(source, predictions, results)
    there = found_by_id(source, predictions, {"info": {"x": [1]}, "annotations": results, "images": [7]})
    for found in (here, there):
        assert [found[name].predicted.objects.score.tolist() for name in "123"] == [[0.5], [1.0], []]  # type: ignore[union-attr]


def test_results_of_images_that_the_source_lacks_are_named(source: dict[str, Any], predictions: dict[str, Any]) -> None:
    write(predictions, [RESULT, *({**RESULT, "image_id": number} for number in (99, 77, 99, "x"))])
    assert find_all(source, predictions)[1] == ["77", "99", "x"]
    # Of a limited source nobody knows.
    assert find_all({**source, "limit": 1}, predictions)[1] is None


def test_fingerprints_follow_the_results_of_their_own_images(
    source: dict[str, Any], predictions: dict[str, Any]
) -> None:
    source = {**source, "unit_images": 1}
    second = {**RESULT, "image_id": 2}
    write(predictions, [RESULT, second])
    before = fingerprints(source, predictions)
    assert len(set(before)) == 3
    write(predictions, [RESULT, {**second, "score": 0.25}])
    assert [a == b for a, b in zip(before, fingerprints(source, predictions), strict=True)] == [True, False, True]
    # Whether the file has masks concerns every image.
    write(predictions, [{**result, "segmentation": RLE} for result in (RESULT, second)])
    assert not set(before) & set(fingerprints(source, predictions))


MASK = {**RESULT, "segmentation": RLE}
NO_BOX = {key: value for key, value in RESULT.items() if key != "bbox"}
MALFORMED: list[tuple[Any, str]] = [
    ("", "it has none|not JSON"),
    ("[", "not JSON"),
    ("7", "not JSON"),
    ({"results": []}, "expected a list, or an object with annotations"),
    ({"annotations": {}}, "annotations must be a list"),
    ([RESULT, 7], r"results\[1\] must be an object, got int"),
    ([RESULT, {"image_id": 1}], r"results\[1\]: category_id must be a number"),
    ([{**RESULT, "image_id": None}], r"results\[0\]: image_id must be a number or a string, got NoneType"),
    ([{**RESULT, "category_id": 1.5}], r"results\[0\]: category_id must be a number, got float"),
    (
        [{key: value for key, value in RESULT.items() if key != "score"}],
        r"results\[0\]: score must be a number, it has",
    ),
    ([{**RESULT, "score": "0.5"}], "score must be a number, got str"),
    ([{**RESULT, "score": True}], "score must be a number, got bool"),
    ([RESULT, {**RESULT, "score": float("nan")}], r"results\[1\]: score must be finite, got nan"),
    ([{**RESULT, "score": 10**400}], "score must be finite"),
    ([{**RESULT, "bbox": [1, 2, 3]}], r"results\[0\]: bbox must be four numbers"),
    ([{**RESULT, "bbox": [1, 2, 3, float("inf")]}], "bbox must be four numbers"),
    ([{**RESULT, "bbox": {"x": 1}}], "bbox must be four numbers"),
    ([{**RESULT, "bbox": ["1", 2, 3, 4]}], "bbox must be four numbers"),
    ([NO_BOX], r"results\[0\] must have a bbox or a segmentation, it has image_id, category_id, score"),
    ([RESULT, MASK], r"results\[1\] has bbox and segmentation, the first result bbox"),
    ([MASK, RESULT], r"results\[1\] has bbox, the first result bbox and segmentation"),
    ([{**NO_BOX, "segmentation": RLE}, MASK], r"results\[1\] has bbox and segmentation, the first result segmentation"),
    ([{**NO_BOX, "segmentation": "P"}], "segmentation must be polygons or run lengths"),
    ([{**NO_BOX, "segmentation": {"counts": "P"}}], "segmentation must have size, height and width"),
    ([{**NO_BOX, "segmentation": {"size": [8, 10.0], "counts": "P"}}], "segmentation must have size"),
    ([{**NO_BOX, "segmentation": {"size": [2**20, 2**20], "counts": "P"}}], "segmentation must have size"),
    ([{**NO_BOX, "segmentation": {"size": [8, 10], "counts": 5}}], "segmentation must have size"),
]


@pytest.mark.parametrize(("results", "message"), MALFORMED)
def test_a_file_that_is_none_is_refused(
    source: dict[str, Any], predictions: dict[str, Any], results: Any, message: str
) -> None:
    write(predictions, results)
    with pytest.raises(ConfigError, match=message):
        find_all(source, predictions)


def test_a_file_that_is_missing_or_too_large(source: dict[str, Any], predictions: dict[str, Any]) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        find_all(source, predictions)
    write(predictions, [RESULT])
    with pytest.raises(StorageError, match="larger than the 10 bytes"):
        find_all(source, {**predictions, "max_bytes": 10})


def with_mask(segmentation: Any, number: int = 1) -> dict[str, Any]:
    return {**NO_BOX, "image_id": number, "segmentation": segmentation}


@pytest.mark.parametrize(
    ("segmentations", "message"),
    [
        ([{"size": [8, 10], "counts": "\x00"}], "expected run lengths"),
        ([{"size": [8, 10], "counts": [1, -5]}], "expected COCO masks"),
        ([RLE, {"size": [9, 10], "counts": RLE["counts"]}], "expected masks of one size"),
        ([[1, 2, 3, 4, 5, 6]], "expected COCO masks"),
        ([[["a"] * 6]], "expected COCO masks"),
        ([[[0, 0, 1e8, 0, 1e8, 1e8]]], "expected outlines of at most"),
        ([[[0, 0, float("nan"), 0, 5, 5]]], "expected outlines of at most"),
        ([[[0, 0, 9, 9, 0, 1e5] * 9000]], "expected outlines of at most"),
    ],
)
def test_a_mask_that_is_none_fails_its_image_alone(
    source: dict[str, Any], predictions: dict[str, Any], segmentations: list[Any], message: str
) -> None:
    found = found_by_id(source, predictions, [*map(with_mask, segmentations), with_mask(RLE, 2)])
    assert isinstance(found["1"].error, PredictError)
    assert re.search(message, str(found["1"].error))
    assert (found["1"].predicted, found["1"].error_stage) == (None, "decode")
    assert found["2"].error is None


@pytest.mark.parametrize("form", ["rle", "counts", "polygon"])
def test_every_form_of_mask(source: dict[str, Any], predictions: dict[str, Any], form: str) -> None:
    counts = {"size": [8, 10], "counts": [10, 4, 4, 4, 4, 4, 4, 4, 42]}
    segmentation = {"rle": RLE, "counts": counts, "polygon": [[1, 2, 1, 6, 5, 6, 5, 2]]}[form]
    write(predictions, [with_mask(segmentation), with_mask(segmentation, 2)])
    pairs, _ = find_all(source, predictions)
    assert [(found.width, found.height) for _, found in pairs if found] == [(10, 8), (10, 8), (0, 0)]
    scores = score_all(pairs, taxonomy_of(source))
    assert figures(scores, "segm")["AP"] == pytest.approx(1)


def test_a_size_or_category_that_the_target_does_not_have(source: dict[str, Any], predictions: dict[str, Any]) -> None:
    larger = {"size": [9, 10], "counts": encode_rle(np.ones((9, 10), bool))}
    strange = {**with_mask(RLE, 2), "category_id": 7}
    write(predictions, [with_mask(larger), strange, {**strange, "category_id": 10**30, "image_id": 3}])
    pairs, _ = find_all(source, predictions)
    taxonomy = taxonomy_of(source)
    scorer = Scorer.build(ScoreConfig(), taxonomy, taxonomy, max_pixels=1000)
    errors = []
    for sample, found in pairs:
        assert found is not None
        if found.predicted is None:
            errors.append((type(found.error).__name__, str(found.error)))
            continue
        score = scorer.score(found.predicted, sample.targets, key=1, width=found.width, height=found.height)
        assert score is not None
        errors.append((score["error_type"], score["error_message"]))
    assert [kind for kind, _ in errors] == ["TargetMismatchError", "PredictError", "PredictError"]
    assert "the target is 10x8 pixels, the prediction 10x9" in errors[0][1]
    assert "categories that coco lacks: [7]" in errors[1][1]
    assert "too large" in errors[2][1] or "too big" in errors[2][1]


def test_the_driver_never_holds_all_results_as_objects(
    source: dict[str, Any], predictions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.READ_BYTES", 1 << 16)
    write(predictions, [{**RESULT, "image_id": 1 + number % 3, "score": number / 20_000} for number in range(20_000)])
    peaks = []
    for read in (lambda: fingerprints(source, predictions), lambda: json.loads(predictions["uri"].read_bytes())):
        tracemalloc.start()
        read()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 0.8 * peaks[1]
