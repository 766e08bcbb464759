"""Reports: official values, the same bytes from any files, equal to merging states one by one, tables beside them."""

import json
import random
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dense_helpers import coco_panoptic, coco_taxonomy
from detection_oracle import our_states
from hypothesis import given, settings
from hypothesis import strategies as st
from report_helpers import (
    SPACE,
    depth_score,
    detection_scores,
    failed,
    mixed_rows,
    png,
    row,
    scorer,
    semantic_score,
    write_table,
)
from s3_endpoint import S3

from pipeline.errors import ConfigError, SchemaError
from pipeline.metrics.boundary import BoundaryCounts
from pipeline.metrics.confusion import Confusion
from pipeline.metrics.depth import Depth
from pipeline.metrics.detection import Detection
from pipeline.metrics.panoptic import PanopticState
from pipeline.predictions.base import Predicted
from pipeline.report.report import ReportOptions, encode, plain, write_report
from pipeline.report.rows import OUTCOMES, open_scored
from pipeline.storage import open_fs
from pipeline.taxonomy import Category, Taxonomy

NO_INTERVALS = ReportOptions(replicates=0)


def report_bytes(folder: Path, rows: list[dict[str, Any]], options: ReportOptions, **table: Any) -> bytes:
    uri = write_table(folder, rows, **table)
    write_report(open_scored(uri, {})[0], f"{uri}/_report", {}, options)
    return (folder / "_report" / "report.json").read_bytes()


def report_of(folder: Path, rows: list[dict[str, Any]], options: ReportOptions = NO_INTERVALS, **table: Any) -> Any:
    return json.loads(report_bytes(folder, rows, options, **table))


@settings(deadline=None, max_examples=3)
@given(
    st.integers(0, 2**16),
    st.lists(st.integers(0, 30), max_size=6),
    st.lists(st.integers(0, 30), max_size=6),
    st.randoms(use_true_random=False),
)
def test_any_order_and_files_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, seed: int, cuts: list[int], others: list[int], shuffle: random.Random
) -> None:
    rows = mixed_rows(seed, 30)
    options = ReportOptions(by=["city", "shard"], replicates=100, images=3)
    folder = tmp_path_factory.mktemp("report")
    first = report_bytes(folder / "a", rows, options, cuts=cuts)
    shuffle.shuffle(rows)
    assert report_bytes(folder / "b", rows, options, cuts=others) == first
    counts = json.loads(first)["counts"]
    assert counts["images"] == sum(counts[outcome] for outcome in OUTCOMES) == 30
    assert sum(problem["count"] for problem in json.loads(first)["problems"]) == 30 - counts["ok"]


def test_blocks_of_any_size_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = mixed_rows(7, 40)
    options = ReportOptions(by=["city"], replicates=100, images=3)
    whole = report_bytes(tmp_path / "a", rows, options)
    monkeypatch.setattr("pipeline.report.rows.BLOCK_ROWS", 3)
    assert report_bytes(tmp_path / "b", rows, options, cuts=range(2, 40, 2)) == whole


def test_twice_is_the_same(tmp_path: Path) -> None:
    uri = write_table(tmp_path, mixed_rows(1, 20))
    report = tmp_path / "_report" / "report.json"
    bytes_of = []
    for _ in range(2):
        found = write_report(open_scored(uri, {})[0], f"{uri}/_report", {})
        bytes_of.append(report.read_bytes())
        assert json.loads(bytes_of[-1]) == found
    assert bytes_of[0] == bytes_of[1]
    assert found["bootstrap"] == {
        "replicates": 1000,
        "level": 0.95,
        "method": "Poisson weights of each image, percentiles of the replicates",
        "seed": 0,
    }


def test_sections_equal_merging_states_one_by_one(tmp_path: Path) -> None:
    rows = mixed_rows(11, 40)
    report = report_of(tmp_path, rows, cuts=[4, 9, 30])
    scores = [r["score"] for r in rows if r["status"] == "ok" and r["score"] and "error_type" not in r["score"]]
    assert report["counts"]["ok"] == len(scores) < 40

    def merged(state: Any, name: str, empty: Any) -> Any:
        return reduce(lambda a, b: a.merge(b), [state.from_row(s[name]) for s in scores if s.get(name)], empty)

    def same(found: Any, expected: Any) -> None:
        """Every figure of `expected` is in `found`, to the last bit."""
        for name, value in plain(expected).items():
            if isinstance(value, dict):
                same(found[name], value)
            else:
                assert found[name] == value, name

    confusion = merged(Confusion, "confusion", Confusion.empty(SPACE))
    same(report["semantic"], confusion.compute())
    names = [f"class {n}" for n in range(1, 5)]
    expected = {"ids": [1, 2, 3, 4], "names": names, "matrix": confusion.matrix.tolist()}
    assert report["semantic"]["confusion"] == expected
    assert report["semantic"]["per_class"]["3"]["name"] == "class 3"
    same(report["boundary"], merged(BoundaryCounts, "boundary", BoundaryCounts.empty()).compute(SPACE))
    for name in ("panoptic", "boundary_panoptic"):
        same(report[name], merged(PanopticState, name, PanopticState.empty()).compute(SPACE))
        assert report[name]["per_class"]["4"]["kind"] == "stuff"
    for name in ("bbox", "segm"):
        whole = merged(Detection, name, Detection.empty())
        scores_of = whole.compute()
        found = report["detection"][name]
        same(found, scores_of.figures())
        same(found["per_class"], scores_of.per_category())
        assert {key: entry["targets"] for key, entry in found["per_class"].items()} == dict(
            zip(map(str, scores_of.categories), scores_of.target_count, strict=True)
        )
        curve = found["pr_curve"]["precision"]
        assert np.mean(curve["0.5"]) == pytest.approx(found["AP50"])
        assert np.mean(curve["0.75"]) == pytest.approx(found["AP75"])
        assert np.mean(curve["mean"]) == pytest.approx(found["AP"])
        true, false, _ = whole.image_counts().sum(axis=0).tolist()
        assert (sum(found["scores"]["tp"]), sum(found["scores"]["fp"])) == (true, false)
    depth = merged(Depth, "depth", Depth.empty())
    same(report["depth"], depth.compute() | {"per_pixel": depth.compute_pixels(), "images": depth.images})
    histogram = report["depth"]["histogram"]
    assert [histogram["below"], *histogram["counts"], histogram["above"]] == list(depth.log_ratio)
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert report["depth"]["delta_curve"]["threshold"][0] == 1


def test_in_pass_and_later_scores_are_one_report(tmp_path: Path) -> None:
    rows = mixed_rows(5, 25)
    later = []
    for stored in rows:
        error = (stored.get("score") or {}).get("error_type")
        if stored["status"] == "ok" and stored["score"] is None:
            stored = failed(stored["image_id"], "MissingTargetError", "match")
            stored["error_message"] = "the source has no target of the prediction's kind for this image"
        elif error:
            stored = failed(stored["image_id"], error, "score") | {"error_message": stored["score"]["error_message"]}
        later.append(stored)
    first, second = report_of(tmp_path / "a", rows), report_of(tmp_path / "b", later, job="evaluate")
    # Rows without a score have no size in a scores table.
    for report in (first, second):
        del report["run"], report["sizes"]
    assert first == second


def object_taxonomy(tree: Any) -> Taxonomy:
    return Taxonomy(
        "coco", "the file", tuple(Category(c["id"], c["name"], "thing", (0, 0, 0)) for c in tree["categories"])
    )


def test_official_detection(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "coco_ap"
    targets = json.loads((folder / "instances_val2014_100.json").read_text())
    rows = [row(f"val/{n}", {}) for n in range(len(targets["images"]))]
    for kind in ("bbox", "segm"):
        results = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
        for stored, state in zip(rows, our_states(targets, results, kind), strict=True):
            stored["score"][kind] = state.to_row()
    report = report_of(tmp_path, rows, cuts=[31, 77], taxonomy=object_taxonomy(targets))
    lines = (folder / "expected.txt").read_text()
    official = {"bbox": (0.5045806987, 0.6969727247), "segm": (0.3195452759, 0.5622883973)}
    for kind, figures in report["detection"].items():
        part = lines.split(f"type={kind}")[1].split("type=")[0].splitlines()
        printed = [float(line.split("=")[-1]) for line in part if "Average" in line]
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
        assert [round(figures[name], 3) for name in names] == printed
        assert (figures["AP"], figures["AP50"]) == pytest.approx(official[kind], abs=1e-9)


def test_official_panoptic(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "panoptic4"
    space = coco_taxonomy(folder / "coco_gt.json")
    pairs = zip(
        coco_panoptic(folder / "coco_gt.json", folder / "coco_gt"),
        coco_panoptic(folder / "coco_pred.json", folder / "coco_pred"),
        strict=True,
    )
    states = [PanopticState.from_segments(*target, *pred, space) for target, pred in pairs]
    rows = [row(f"val/{n}", {"panoptic": state.to_row()}) for n, state in enumerate(states)]
    panoptic = report_of(tmp_path, rows, cuts=[1], taxonomy=space)["panoptic"]
    found = [panoptic["All"][name] for name in ("PQ", "SQ", "RQ")]
    assert found == pytest.approx([0.6740486629, 0.6834387674, 0.8205128205], abs=1e-9)
    assert panoptic["All"]["n"] == 6
    assert panoptic["Things"]["PQ"] == pytest.approx(0.5769675073, abs=1e-9)
    assert panoptic["Stuff"]["PQ"] == pytest.approx(0.8682109740, abs=1e-9)


def test_official_depth(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "depth_pair"
    pred_HW, target_HW = np.load(folder / "pred.npy"), np.load(folder / "depth.npy")
    state = Depth.from_image(np.squeeze(pred_HW), np.squeeze(target_HW))
    depth = report_of(tmp_path, [row("nyu/0", {"depth": state.to_row()})])["depth"]
    expected = {"AbsRel": 0.1404982, "RMSE": 0.6180007, "SILog": 18.870581, "SqRel": 0.0986683, "log10": 0.0620487,
                "delta1": 0.777264, "delta2": 0.964724, "delta3": 0.999621}  # fmt: skip
    assert {name: depth[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_figures_against_counting_pixels(tmp_path: Path) -> None:
    """mIoU of all images at once from the label maps themselves."""
    rng = np.random.default_rng(0)
    targets = [rng.choice([1, 2, 3, 4, 255], (9, 11)).astype(np.uint8) for _ in range(12)]
    preds = [rng.choice([1, 2, 3, 255], (9, 11)).astype(np.uint8) for _ in range(12)]
    rows = [
        row(f"a/{n}", scorer().score(Predicted(label_HW=pred), {"semantic": png(target)}, key=""))
        for n, (target, pred) in enumerate(zip(targets, preds, strict=True))
    ]
    semantic = report_of(tmp_path, rows, cuts=[5])["semantic"]
    target, pred = np.stack(targets), np.stack(preds)
    known = target != 255
    iou = [((target == n) & (pred == n)).sum() / (((target == n) | (pred == n)) & known).sum() for n in range(1, 5)]
    assert [semantic["per_class"][str(n)]["IoU"] for n in range(1, 5)] == pytest.approx(iou, abs=1e-15)
    assert semantic["mIoU"] == pytest.approx(np.mean(iou), abs=1e-15)
    assert semantic["pixel_accuracy"] == pytest.approx(((target == pred) & known).sum() / known.sum(), abs=1e-15)
    assert [line[-1] for line in semantic["confusion"]["matrix"]] == [
        ((target == n) & (pred == 255)).sum() for n in range(1, 5)
    ]


def test_tables(tmp_path: Path) -> None:
    rows = [*mixed_rows(4, 30), failed("z/1"), row("z/2")]
    options = ReportOptions(by=["city", "shard"], replicates=0)
    report = report_of(tmp_path, rows, options, cuts=[3, 20])
    tables = {path.stem: pq.read_table(path) for path in (tmp_path / "_report").glob("*.parquet")}
    assert set(tables) == {"images", "problems", "per_class", "slices", "confusion"}

    images = {item["image_id"]: item for item in tables["images"].to_pylist()}
    assert set(images) == {stored["image_id"] for stored in rows}
    for name, entries in report["worst"].items():
        for entry in entries:
            assert images[entry["image_id"]][name.replace(".", "_")] == entry["value"]
    for stored in rows:
        assert dict(images[stored["image_id"]]["fields"] or ()) == dict(stored.get("fields") or ())
    f1 = images[report["worst"]["detection.segm.F1"][-1]["image_id"]]
    assert f1["detection_segm_F1"] == pytest.approx(
        2 * f1["detection_segm_tp"] / (2 * f1["detection_segm_tp"] + f1["detection_segm_fp"] + f1["detection_segm_fn"])
    )

    problems = {item["image_id"]: item for item in tables["problems"].to_pylist()}
    assert set(problems) == {name for name, item in images.items() if item["outcome"] != "ok"} >= {"z/1", "z/2"}
    assert problems["z/1"] == {
        "image_id": "z/1",
        "shard_id": "z",
        "position": 1,
        "outcome": "failed",
        "error_type": "CorruptImageError",
        "error_stage": "decode",
        "error_message": "bad z/1",
    }

    classes = {item["category_id"]: item for item in tables["per_class"].to_pylist()}
    assert list(classes) == [1, 2, 3, 4]
    assert classes[2]["semantic_IoU"] == report["semantic"]["per_class"]["2"]["IoU"]
    assert classes[2]["panoptic_tp"] == report["panoptic"]["per_class"]["2"]["tp"]
    assert classes[2]["segm_AP50"] == report["detection"]["segm"]["per_class"]["2"]["AP50"]
    assert classes[4]["bbox_AP"] is None
    assert classes[4]["kind"] == "stuff"

    cells = tables["confusion"].to_pylist()
    assert sum(cell["pixels"] for cell in cells) == sum(map(sum, report["semantic"]["confusion"]["matrix"]))
    slices = tables["slices"].to_pylist()
    found = [(part["by"], value["value"]) for part in report["slices"] for value in part["values"]]
    assert [(item["by"], item["value"]) for item in slices] == found
    assert slices[0]["panoptic_All_PQ"] == report["slices"][0]["values"][0]["panoptic"]["All"]["PQ"]


def test_what_an_earlier_report_left_is_gone(tmp_path: Path) -> None:
    rows = [row("a/0", semantic_score(1), fields=[("city", "x")])]
    folder = tmp_path / "_report"
    report_of(tmp_path, rows, ReportOptions(by=["city"], replicates=0))
    (folder / "index.html").write_text("old")
    assert {"slices.parquet", "confusion.parquet"} <= {path.name for path in folder.iterdir()}
    scored = open_scored(str(tmp_path), {})[0]
    write_report(scored, str(folder), {}, NO_INTERVALS)
    assert {path.name for path in folder.iterdir()} == {
        "report.json", "images.parquet", "problems.parquet", "per_class.parquet", "confusion.parquet"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="did you mean city"):
        write_report(scored, str(folder), {}, ReportOptions(by=["citi"]))


def test_only_one_kind_of_score(tmp_path: Path) -> None:
    report = report_of(tmp_path, [row(f"a/{n}", depth_score(n)) for n in range(5)], ReportOptions(replicates=50))
    assert "depth" in report
    assert not {"semantic", "boundary", "panoptic", "boundary_panoptic", "detection", "slices"} & report.keys()
    assert set(report["worst"]) == {"depth.AbsRel", "depth.RMSE", "depth.delta1"}
    worst = [entry["value"] for entry in report["worst"]["depth.AbsRel"]]
    assert worst == sorted(worst, reverse=True)
    assert all(path.startswith("depth.") for path in report["intervals"])
    for path, (low, high) in report["intervals"].items():
        assert low <= report["depth"][path.removeprefix("depth.")] <= high
    assert report["sizes"]["counts"] == [5]
    assert report["sizes"]["edges"][0] <= 0.3072 <= report["sizes"]["edges"][1]


def test_nothing_was_scored(tmp_path: Path) -> None:
    rows = [failed("a/0", "MissingPredictionError", "match"), failed("a/1", "MissingTargetError", "match")]
    report = report_of(tmp_path, rows, ReportOptions(replicates=20), job="evaluate")
    assert report["counts"] == {"images": 2, "ok": 0, "failed": 0, "missing_target": 1, "missing_prediction": 1}
    assert set(report) == {
        "format", "model", "run", "counts", "problems", "intervals", "bootstrap", "image_figures", "worst", "best"
    }  # fmt: skip
    assert report["worst"] == report["intervals"] == {}
    assert pq.read_table(tmp_path / "_report" / "images.parquet").num_rows == 2


def test_an_empty_table(tmp_path: Path) -> None:
    uri = write_table(tmp_path, [], job="evaluate")
    report = write_report(open_scored(uri, {})[0], f"{uri}/_report", {})
    assert report["counts"]["images"] == 0
    assert report["problems"] == []


def test_no_evidence_is_null(tmp_path: Path) -> None:
    void = Confusion.from_maps(np.full((2, 2), 255), np.full((2, 2), 1), SPACE)
    stored = row("a/0", {"confusion": void.to_row(), "classes": void.class_counts().to_row()})
    report = report_of(tmp_path, [stored], ReportOptions(replicates=30))
    assert report["semantic"]["mIoU"] is None
    assert report["semantic"]["per_class"]["1"]["IoU"] is None
    assert report["intervals"] == {}
    assert report["worst"] == {}


def test_an_image_twice_in_detection_records(tmp_path: Path) -> None:
    records = detection_scores(1, 1)[0]
    rows = [row(f"a/{n}", {"bbox": records["bbox"]}) for n in range(2)]
    with pytest.raises(SchemaError, match="each image once"):
        report_of(tmp_path, rows)


def test_provenance(tmp_path: Path) -> None:
    more = {"seconds": {"score": 1.5}, "label_s": 2.0, "config": {"source": {"format": "files"}}}
    report = report_of(tmp_path, [row("a/0", semantic_score(1))], **more)
    assert report["format"] == 1
    assert report["model"] == {
        "label": "m", "version": "v1", "task": "semantic", "taxonomy": "test", "score_taxonomy": "test",
        "mapping": None, "license": "MIT", "parameters": 5,
    }  # fmt: skip
    assert report["run"].items() >= {"run_id": "20240506T070809-abcdef", "job": "label", **more}.items()
    assert "models" not in report["run"]


def test_encoding() -> None:
    text = encode({"a": {"b": [1, None]}, "c": 0.1})
    assert text == '{\n"a": {"b": [1, null]},\n"c": 0.1\n}\n'
    assert plain({1: (float("nan"), float("inf"), 2.5)}) == {"1": [None, None, 2.5]}
    with pytest.raises(ValueError, match="Out of range"):
        encode({"a": float("nan")})


def test_on_object_storage(s3: S3) -> None:
    uri = f"s3://{s3.bucket('reports')}/table"
    write_table(uri, mixed_rows(3, 12), storage=s3.options)
    found = write_report(open_scored(uri, s3.options)[0], f"{uri}/_report", s3.options, NO_INTERVALS)
    fs, path = open_fs(f"{uri}/_report", s3.options)
    assert json.loads(fs.cat_file(f"{path}/report.json")) == found
    images = pq.read_table(pa.BufferReader(fs.cat_file(f"{path}/images.parquet")))
    assert images.num_rows == 12
