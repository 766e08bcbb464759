"""Comparing two runs: equal to two reports of the common images, paired intervals, laws, nothing dropped."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compare_helpers import KINDS, Rows, compared, name_of, ok_ids, opened, two_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from report_helpers import SPACE, depth_score, failed, label_maps, png, row, scorer, semantic_score, write_table
from s3_endpoint import S3

from pipeline.errors import ConfigError, SchemaError
from pipeline.metrics.confusion import ClassCounts
from pipeline.metrics.score import SCORE
from pipeline.predictions.base import Predicted
from pipeline.report.compare.comparison import CompareOptions, write_comparison
from pipeline.report.compare.pairs import find
from pipeline.report.figures import IMAGE_FIGURES, image_figures
from pipeline.report.formats import figure_format
from pipeline.report.report import ReportOptions, plain, write_report
from pipeline.report.rows import open_scored
from pipeline.report.terminal import CLASS_FIGURES, FIGURES
from pipeline.storage import open_fs
from pipeline.taxonomy import Category, Taxonomy


def at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree.get(name, {})
    return tree


def report_of(folder: Path, rows: Rows) -> dict[str, Any]:
    uri = write_table(folder, rows)
    return write_report(open_scored(uri, {})[0], f"{uri}/_report", {}, ReportOptions(replicates=0))


@pytest.fixture(scope="module")
def runs() -> tuple[Rows, Rows]:
    return two_runs(5, 60)


@pytest.fixture(scope="module")
def found(runs: tuple[Rows, Rows], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("compared")
    return compared(folder, *runs), folder / "out"


def test_figures_are_those_of_two_reports_of_the_common_images(
    runs: tuple[Rows, Rows], found: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    comparison, _ = found
    common = ok_ids(runs[0]) & ok_ids(runs[1])
    assert comparison["counts"]["common"] == len(common) < 60
    a, b = (
        report_of(tmp_path / side, [r for r in rows if r["image_id"] in common])
        for side, rows in zip("ab", runs, strict=True)
    )
    expected = [path for path in FIGURES if at(a, path) is not None and at(b, path) is not None]
    assert list(comparison["figures"]) == expected
    assert len(expected) > 50
    for path, figure in comparison["figures"].items():
        assert (figure["a"], figure["b"]) == (at(a, path), at(b, path)), path
        assert figure["difference"] == figure["b"] - figure["a"]
    assert list(comparison["per_class"]) == list(CLASS_FIGURES)
    for path, classes in comparison["per_class"].items():
        intervals = {entry["interval"] is None for entry in classes.values()}
        assert intervals == ({True} if path.startswith("detection") else {False}), path
        section, _, name = path.rpartition(".")
        rows_a, rows_b = at(a, section)["per_class"], at(b, section)["per_class"]
        assert set(classes) == {*rows_a, *rows_b}
        for identifier, entry in classes.items():
            values = [rows.get(identifier, {}).get(name) for rows in (rows_a, rows_b)]
            assert [entry["a"], entry["b"]] == values, (path, identifier)
            assert entry["difference"] == (None if None in values else values[1] - values[0])


def test_nothing_is_dropped(runs: tuple[Rows, Rows], found: tuple[dict[str, Any], Path]) -> None:
    comparison, folder = found
    counts = comparison["counts"]
    a, b = (ok_ids(rows) for rows in runs)
    every = {r["image_id"] for rows in runs for r in rows}
    assert counts["only_a"] == len(a - b)
    assert counts["only_b"] == len(b - a)
    assert counts["neither"] == len(every - a - b) > 0
    assert counts["common"] + counts["only_a"] + counts["only_b"] + counts["neither"] == len(every)
    for side, rows in zip("ab", runs, strict=True):
        assert counts[side]["images"] == len(rows) == sum(counts[side].values()) - counts[side]["images"]
    booked = {
        (ok_in, lacking_in): sum(
            p["count"] for p in comparison["problems"] if (p["ok_in"], p["lacking_in"]) == (ok_in, lacking_in)
        )
        for ok_in, lacking_in in (("a", "b"), ("b", "a"), ("neither", "a"), ("neither", "b"))
    }
    assert list(booked.values()) == [counts["only_a"], counts["only_b"], counts["neither"], counts["neither"]]
    rows_out = pq.read_table(folder / "problems.parquet").to_pylist()
    assert len(rows_out) == sum(booked.values())
    by_id = [{r["image_id"]: r for r in rows} for rows in runs]
    for problem in rows_out:
        name, lacking = problem["image_id"], by_id["ab".index(problem["lacking_in"])]
        assert problem["ok_in"] == ("a" if name in a else "b" if name in b else "neither")
        if name not in lacking:
            assert problem["outcome"] == "absent"
        elif lacking[name]["status"] == "failed":
            assert (problem["outcome"], problem["error_type"]) == ("failed", lacking[name]["error_type"])
        else:
            assert problem["outcome"] == "missing_target"
    kinds = {problem["outcome"] for problem in comparison["problems"]}
    assert kinds == {"absent", "failed", "missing_target"}
    for problem in comparison["problems"]:
        assert problem["examples"][0]["image_id"] in every


def test_images(runs: tuple[Rows, Rows], found: tuple[dict[str, Any], Path]) -> None:
    comparison, folder = found
    common = sorted(ok_ids(runs[0]) & ok_ids(runs[1]))
    figures = []
    for rows in runs:
        by_id = {r["image_id"]: r for r in rows}
        figures.append(image_figures(pa.array([by_id[name]["score"] for name in common], SCORE)))
    written = {r["image_id"]: r for r in pq.read_table(folder / "images.parquet").to_pylist()}
    assert sorted(written) == common
    assert set(comparison["images"]) == {figure.name for figure in IMAGE_FIGURES}
    for figure in IMAGE_FIGURES:
        a, b = (side[figure.name] for side in figures)
        gain = (b - a) * (1 if figure.rising else -1)
        told = comparison["images"][figure.name]
        assert told["images"] == np.count_nonzero(~np.isnan(gain))
        assert told["better"] == np.count_nonzero(gain > 0)
        assert told["worse"] == np.count_nonzero(gain < 0)
        assert told["equal"] == np.count_nonzero(gain == 0) > 0
        assert told["only_a"] == np.count_nonzero(~np.isnan(a) & np.isnan(b))
        assert told["only_b"] == np.count_nonzero(np.isnan(a) & ~np.isnan(b))
        assert told["mean_change"] == pytest.approx(np.nanmean(b - a))
        assert told["median_change"] == pytest.approx(np.nanmedian(b - a))
        histogram = told["histogram"]
        assert sum(histogram["counts"]) + histogram["below"] + histogram["above"] == told["better"] + told["worse"]
        assert 0.0 in histogram["edges"]
        order = sorted((-gain[n], common[n], n) for n in range(len(common)) if gain[n] > 0)
        assert [entry["image_id"] for entry in told["improved"]] == [name for _, name, _ in order[:4]]
        order = sorted((gain[n], common[n], n) for n in range(len(common)) if gain[n] < 0)
        assert [entry["image_id"] for entry in told["regressed"]] == [name for _, name, _ in order[:4]]
        for entry in told["improved"] + told["regressed"]:
            n = common.index(entry["image_id"])
            assert [entry["a"], entry["b"], entry["difference"]] == [a[n], b[n], b[n] - a[n]]
            assert f"{entry['shard_id']}/{entry['position']}" == entry["image_id"]
        column = figure.name.replace(".", "_")
        for n, name in enumerate(common):
            got = [written[name][f"{column}_{value}"] for value in ("a", "b", "difference")]
            assert got == plain([a[n], b[n], b[n] - a[n]])


def test_per_class_table(found: tuple[dict[str, Any], Path]) -> None:
    comparison, folder = found
    rows = {str(r["category_id"]): r for r in pq.read_table(folder / "per_class.parquet").to_pylist()}
    assert list(rows) == [str(c.id) for c in SPACE.categories]
    for prefix, path in (("semantic_IoU", "semantic.IoU"), ("segm_AP", "detection.segm.AP")):
        for identifier, entry in comparison["per_class"][path].items():
            row_ = rows[identifier]
            assert [row_[f"{prefix}_{name}"] for name in ("a", "b", "difference")] == [
                entry[name] for name in ("a", "b", "difference")
            ]
            assert [row_[f"{prefix}_low"], row_[f"{prefix}_high"]] == (entry["interval"] or [None, None])


def test_intervals_are_those_of_a_paired_bootstrap(tmp_path: Path) -> None:
    """Drawing images with replacement, both runs' scores of the same draw, 500 times."""
    seeds = range(60)
    a = [row(name_of(n), semantic_score(n)) for n in seeds]
    # B is A with some pixels mended: a small difference beside the spread of the images.
    b = [row(name_of(n), mended_score(n)) for n in seeds]
    comparison = compared(tmp_path, a, b, replicates=2000)
    sums = [
        np.stack([_sums(ClassCounts.from_row(r["score"]["classes"])) for r in rows]) for rows in (a, b)
    ]  # (N, 4, 3)
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(500):
        weights = np.bincount(rng.integers(0, 60, 60), minlength=60)
        ious = [_iou(np.tensordot(weights, side, 1)) for side in sums]
        drawn.append([(ious[1] - ious[0]).mean(), ious[1][2] - ious[0][2]])
    for column, told in (
        (0, comparison["figures"]["semantic.mIoU"]),
        (1, comparison["per_class"]["semantic.IoU"]["3"]),
    ):
        values = np.array(drawn)[:, column]
        expected = np.percentile(values, [2.5, 97.5])
        # As in test_replicates: the standard error of a percentile of 500 draws is 0.12 of the deviation, of 2000 half.
        assert told["interval"] == pytest.approx(expected.tolist(), abs=4 * 0.14 * values.std())
        assert np.diff(told["interval"]) == pytest.approx(np.diff(expected), rel=0.25)
    told = comparison["figures"]["semantic.mIoU"]
    assert (told["change"], told["excludes_zero"]) == ("better", True)
    # The same images vary far more than the difference: an unpaired interval would be several times as wide.
    alone = np.array(
        [_iou(np.tensordot(np.bincount(rng.integers(0, 60, 60), minlength=60), sums[0], 1)).mean() for _ in range(200)]
    )
    assert 2 * np.diff(told["interval"])[0] < np.diff(np.percentile(alone, [2.5, 97.5]))[0]


def mended_score(seed: int) -> dict[str, Any]:
    target_HW, pred_HW = label_maps(seed)
    mended_HW = pred_HW.copy()
    mended_HW[:2] = target_HW[:2]
    score = scorer().score(Predicted(label_HW=mended_HW), {"semantic": png(target_HW)}, key="")
    assert score is not None
    return score


def _sums(counts: ClassCounts) -> Any:
    sums = np.zeros((4, 3))
    sums[counts.category_id - 1] = counts.sums
    return sums


def _iou(sums: Any) -> Any:
    intersection, target, pred = sums.T
    return intersection / (target + pred - intersection)


def test_a_run_against_itself(runs: tuple[Rows, Rows], tmp_path: Path) -> None:
    comparison = compared(tmp_path, runs[0], runs[0])
    assert comparison["figures"]
    with_interval = [path for path, figure in comparison["figures"].items() if figure["interval"] is not None]
    assert len(with_interval) > 30
    for path, figure in comparison["figures"].items():
        assert figure["difference"] == 0
        if path in with_interval:
            assert figure["interval"] == [0.0, 0.0]
            assert (figure["excludes_zero"], figure["change"]) == (False, "equal")
    for classes in comparison["per_class"].values():
        assert {entry["difference"] for entry in classes.values()} <= {0.0, None}
    for told in comparison["images"].values():
        assert told["equal"] == told["images"] > 0
        assert (told["better"], told["worse"], told["mean_change"], told["histogram"]) == (0, 0, 0, None)
        assert told["improved"] == told["regressed"] == []
    counts = comparison["counts"]
    assert (counts["only_a"], counts["only_b"]) == (0, 0)
    assert counts["common"] + counts["neither"] == len(runs[0])
    assert comparison["settings"] == []


def test_swapping_negates(runs: tuple[Rows, Rows], found: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    there, back = found[0], compared(tmp_path, runs[1], runs[0])
    opposite = {"better": "worse", "worse": "better", "equal": "equal", "unclear": "unclear", None: None}
    assert list(back["figures"]) == list(there["figures"])
    for path, figure in back["figures"].items():
        other = there["figures"][path]
        assert (figure["a"], figure["b"], figure["difference"]) == (other["b"], other["a"], -other["difference"])
        assert figure["change"] == opposite[other["change"]]
        if figure["interval"]:
            low, high = other["interval"]
            assert figure["interval"] == pytest.approx([-high, -low], abs=1e-15)
    assert {figure["change"] for figure in there["figures"].values()} > {None, "unclear"}
    for name, told in back["images"].items():
        other = there["images"][name]
        assert (told["better"], told["worse"], told["equal"]) == (other["worse"], other["better"], other["equal"])
        assert told["mean_change"] == -other["mean_change"]
        assert [e["image_id"] for e in told["improved"]] == [e["image_id"] for e in other["regressed"]]
    swapped = [there["counts"][name] for name in ("common", "only_b", "only_a", "neither", "b", "a")]
    assert [back["counts"][name] for name in ("common", "only_a", "only_b", "neither", "a", "b")] == swapped


@settings(deadline=None, max_examples=2)
@given(st.integers(0, 2**16), st.lists(st.integers(0, 25), max_size=5), st.randoms(use_true_random=False))
def test_any_order_and_files_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, seed: int, cuts: list[int], shuffle: random.Random
) -> None:
    a, b = two_runs(seed, 25)
    folder = tmp_path_factory.mktemp("bytes")
    compared(folder / "x", a, b, replicates=50)
    shuffle.shuffle(a)
    shuffle.shuffle(b)
    compared(folder / "y", a, b, replicates=50, cuts=cuts)
    whole = [(folder / name / "out" / "compare.json").read_bytes() for name in "xy"]
    assert whole[0] == whole[1]
    assert len(json.loads(whole[0])["figures"]) > 20


def test_blocks_of_any_size_give_the_same_bytes(
    runs: tuple[Rows, Rows], found: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.report.rows.BLOCK_ROWS", 3)
    assert compared(tmp_path, *runs, cuts=range(2, 50, 2)) == found[0]
    assert (tmp_path / "out" / "compare.json").read_bytes() == (found[1] / "compare.json").read_bytes()


@pytest.mark.parametrize("path", ["depth.AbsRel", "depth.delta1", "semantic.mIoU"])
def test_better_is_lower_for_errors(path: str, tmp_path: Path) -> None:
    """B is A with the worse half of the images replaced by the better half."""
    make = depth_score if path.startswith("depth") else semantic_score
    scores = [make(n) for n in range(24)]
    values = image_figures(pa.array(scores, SCORE))[path]
    lower = figure_format(path).lower
    order = np.argsort(values if lower else -values)
    a = [row(name_of(n), scores[order[n]]) for n in range(24)]
    b = [row(name_of(n), scores[order[n % 12]]) for n in range(24)]
    comparison = compared(tmp_path, a, b, replicates=200)
    figure = comparison["figures"][path]
    assert figure["change"] == "better"
    assert (figure["difference"] < 0) == lower
    told = comparison["images"][path]
    assert (told["better"], told["worse"], told["equal"]) == (12, 0, 12)
    assert told["regressed"] == []
    assert (told["improved"][0]["difference"] < 0) == lower


def test_ap_may_have_fewer_replicates(runs: tuple[Rows, Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one run has more predictions than the other, the first replicates of both are paired."""
    monkeypatch.setattr("pipeline.report.replicates.LEAST_REPLICATES", 10)
    monkeypatch.setattr("pipeline.report.replicates.PREDICTIONS_IN_ALL", 4000)
    comparison = compared(tmp_path, *runs, replicates=100)
    fewer = comparison["bootstrap"]["replicates_of"]
    assert set(fewer) == {"detection.bbox", "detection.segm"}
    assert all(10 <= count < 100 for count in fewer.values())
    assert comparison["figures"]["detection.segm.AP"]["interval"] is not None


def test_on_object_storage(runs: tuple[Rows, Rows], found: tuple[dict[str, Any], Path], s3: S3) -> None:
    base = f"s3://{s3.bucket('comparisons')}"
    a, b = (
        open_scored(write_table(f"{base}/{side}", rows, storage=s3.options), s3.options)[0]
        for side, rows in zip("ab", runs, strict=True)
    )
    options = CompareOptions(replicates=100, images=4)
    assert write_comparison(a, b, f"{base}/out", s3.options, options) == found[0]
    fs, path = open_fs(f"{base}/out", s3.options)
    assert fs.cat_file(f"{path}/compare.json") == (found[1] / "compare.json").read_bytes()
    images = pq.read_table(pa.BufferReader(fs.cat_file(f"{path}/images.parquet")))
    assert images.num_rows == found[0]["counts"]["common"]


def test_without_intervals(runs: tuple[Rows, Rows], tmp_path: Path) -> None:
    comparison = compared(tmp_path, *runs, replicates=0, images=0)
    assert {(f["interval"], f["excludes_zero"], f["change"]) for f in comparison["figures"].values()} == {(None,) * 3}
    assert all(told["improved"] == told["regressed"] == [] for told in comparison["images"].values())


def test_evidence_in_one_run_alone(tmp_path: Path) -> None:
    """Panoptic scores in A only: no figure of them; depth of half the images in B: said, and each over its own."""
    a = [row(name_of(n), {**semantic_score(n), **depth_score(n)}) for n in range(8)]
    b = [row(name_of(n), semantic_score(n) | (depth_score(n) if n < 4 else {})) for n in range(8)]
    comparison = compared(tmp_path, a, b)
    assert comparison["warnings"] == ["Of the images that are compared, A has 8 scores of the kind depth and B 4."]
    assert comparison["images"]["depth.AbsRel"]["images"] == 4
    assert comparison["images"]["depth.AbsRel"]["only_a"] == 4
    with pytest.raises(ConfigError, match=r"expected figures that both have, got semantic, boundary of m in .*depth"):
        compared(tmp_path / "none", [row("s/1", semantic_score(1))], [row("s/1", depth_score(1))])


def test_other_label_spaces_are_refused(tmp_path: Path) -> None:
    other = Taxonomy("other", "here", (*SPACE.categories[:3], Category(4, "class 4", "thing", (0, 0, 0))))
    a = opened(tmp_path / "a", [row("s/1", semantic_score(1))])
    b = opened(tmp_path / "b", [row("s/1", semantic_score(1))], taxonomy=other)
    with pytest.raises(ConfigError, match=r"got test of m in .*/a and other of m in .*/b, which differ in 2 classes"):
        write_comparison(a, b, str(tmp_path / "out"), {})
    recoloured = Taxonomy(
        "test", "elsewhere", tuple(Category(c.id, c.name, c.kind, (9, 9, 9)) for c in SPACE.categories)
    )
    c = opened(tmp_path / "c", [row("s/1", semantic_score(1))], taxonomy=recoloured)
    assert write_comparison(a, c, str(tmp_path / "out"), {}, CompareOptions(replicates=0))["figures"]


def test_no_common_image_is_refused(tmp_path: Path) -> None:
    a, b = [row("s/1", semantic_score(1)), failed("t/2")], [row("t/2", semantic_score(1))]
    with pytest.raises(ConfigError, match=r"no image is ok in both: 1 of 2 are in m in .*, 1 of 1 in m in .*image_id"):
        compared(tmp_path, a, b)


def test_an_image_twice_is_refused(tmp_path: Path) -> None:
    once = [row(f"s/{n}", semantic_score(n)) for n in range(5)]
    with pytest.raises(SchemaError, match=r"each image once, got two rows of 's/3' in .*/b, model m"):
        compared(tmp_path, once, [*once, failed("s/3")])


def test_two_ids_of_one_hash_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(image_ids: Any, seed: int = 0) -> Any:
        return np.array([int(name.rpartition("/")[2]) % 4 for name in image_ids], np.uint64)

    monkeypatch.setattr("pipeline.report.compare.pairs.hash_images", short)
    rows = [row(f"s/{n}", semantic_score(n)) for n in range(5)]
    with pytest.raises(SchemaError, match=r"'s/0' and 's/4' of .*/a, model m have the same 64-bit hash"):
        compared(tmp_path, rows, rows)


def test_find() -> None:
    known = np.array([2, 5, 2**64 - 1], np.uint64)
    place, is_there = find(known, np.array([5, 0, 2**64 - 1, 3], np.uint64))
    assert is_there.tolist() == [True, False, True, False]
    assert place[is_there].tolist() == [1, 2]
    assert find(known[:0], known)[1].tolist() == [False] * 3


def test_an_earlier_comparison_does_not_stay(tmp_path: Path) -> None:
    rows = [row(f"s/{n}", semantic_score(n)) for n in range(3)]
    (tmp_path / "out").mkdir()
    for name in ("index.html", "confusion.parquet", "mine.txt"):
        (tmp_path / "out" / name).write_text("old")
    compared(tmp_path, rows, rows)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "compare.json",
        "images.parquet",
        "mine.txt",
        "per_class.parquet",
        "problems.parquet",
    ]


def test_every_kind_alone(tmp_path: Path) -> None:
    for kind in KINDS:
        a, b = two_runs(3, 12, [kind])
        comparison = compared(tmp_path / kind, a, b, replicates=20)
        assert {path.split(".")[0].removeprefix("boundary_") for path in comparison["figures"]} - {"boundary"} == {kind}
