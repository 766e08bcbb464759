"""Turns, medians, ratios, tables and JSON of a benchmark, from made-up runs."""

import json
from collections import Counter
from xml.etree import ElementTree

import pytest

from pipeline.bench.cells import ARMS, CELLS, find_cell
from pipeline.bench.chart import chart
from pipeline.bench.figures import Cell, Run, arms_of, rows_of, turns
from pipeline.bench.table import markdown
from pipeline.errors import ConfigError, UnknownModelError

ABOUT = {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0, "gpus": [], "versions": {"maskmill": "0.1.0"}}


def run(arm: str, rate: float, wall_s: float | None = None, first_s: float | None = None) -> Run:
    return Run(arm=arm, images_per_s=rate, wall_s=wall_s, first_row_s=first_s)


def cell(*runs: Run, agreements: dict | None = None, name: str = "light") -> Cell:
    names = list(dict.fromkeys(item.arm for item in runs))
    return Cell(
        name=name,
        corpus="tar",
        model="unet_small",
        task="semantic",
        images=4,
        size_bytes=2_000_000,
        arms=arms_of(names, runs, {name: ARMS[name].leaves_out for name in ARMS}, agreements or {}),
        runs=tuple(runs),
    )


def agreement(**more: object) -> dict:
    whole = {"images": 4, "equal": 4, "loss": 0.0, "figures": {"mIoU": 1.0, "pixel_accuracy": 1.0}, "cause": ""}
    return {**whole, "missing": 0, "strange": 0, "twice": 0, "unlike": 0, **more}


def test_arms_take_turns() -> None:
    order = list(turns(["a", "b", "c"], 3))
    assert [arm for _, arm in order] == list("abcabcabc")
    assert Counter(number for number, _ in order) == {0: 3, 1: 3, 2: 3}


def test_medians_not_means_and_failed_runs_are_told() -> None:
    found = cell(
        run("limit", 10),
        run("limit", 12),
        run("limit", 100),
        run("maskmill", 9, 20, 8),
        Run(arm="daft", problem="exit 1: no"),
        run("daft", 5, 10, 5),
    )
    arms = {arm.name: arm for arm in found.arms}
    assert arms["limit"].figures is not None
    assert arms["limit"].figures.images_per_s == 12
    assert (arms["limit"].figures.lowest, arms["limit"].figures.highest) == (10, 100)
    assert arms["daft"].problem == "exit 1: no"
    assert arms["daft"].figures is not None
    assert arms["daft"].figures.runs == 1
    assert "exit 1: no" in markdown([found], ABOUT, "2026-01-01", "maskmill bench")


def test_ratios_to_the_limit_and_to_maskmill() -> None:
    found = cell(run("limit", 10), run("maskmill", 8, 20, 10), run("loop", 4, 10, 20), run("daft", 9, 40, 5))
    rows = {row.name: row for row in rows_of(found)}
    assert rows["maskmill"].of_limit == pytest.approx(0.8)
    assert (rows["loop"].rate_to_ours, rows["loop"].wall_to_ours) == (0.5, 2.0)
    assert rows["loop"].ahead == ("whole command",)
    assert rows["daft"].ahead == ("images/s", "first row")
    assert rows["limit"].ahead == rows["maskmill"].ahead == ()


def test_the_limit_is_the_slower_of_model_and_decoding() -> None:
    found = cell(run("limit", 1e6), run("decode", 100), run("maskmill", 90, 20, 10))
    assert [row.of_limit for row in rows_of(found)] == [1e4, 1, 0.9]


def test_the_table_says_who_is_ahead() -> None:
    behind = cell(run("limit", 10), run("maskmill", 8, 20, 10), run("loop", 4, 30, 20))
    text = markdown([behind], ABOUT, "2026-01-01", "maskmill bench")
    assert "No peer is ahead of maskmill." in text
    assert "| **maskmill label** | 8.00 | 0.80 | 1.00 | 20.0 s | 1.00 | 10.0 s |" in text
    ahead = cell(run("maskmill", 8, 20, 10), run("loop", 9, 30, 20))
    assert "Ahead of maskmill: PyTorch DataLoader loop (images/s)." in markdown([ahead], ABOUT, "d", "c")
    alone = cell(run("limit", 10), run("maskmill", 8, 20, 10))
    assert "head of maskmill" not in markdown([alone], ABOUT, "d", "c")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (agreement(), "| all equal |"),
        (agreement(equal=1, figures={"mIoU": 0.98, "pixel_accuracy": 0.99}), "| 1/4 equal, mIoU 0.9800 |"),
        (agreement(images=3, missing=1), "| 1 missing |"),
        (agreement(images=3, unlike=1, strange=2), "| 2 strange, 1 unlike |"),
    ],
)
def test_the_table_says_whether_a_peer_did_the_same(found: dict, said: str) -> None:
    text = markdown(
        [cell(run("maskmill", 8, 20, 10), run("loop", 9, 30, 20), agreements={"loop": found})], ABOUT, "d", "c"
    )
    assert said in text
    assert "leaves out: commits, resuming, failed rows." in text


def test_json_and_drawing() -> None:
    found = cell(run("limit", 10), run("maskmill", 8, 20, 10), run("loop", 9, 30, 20), name="<b>")
    tree = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert tree["rows"][2]["ahead"] == ["images/s"]
    drawing = ElementTree.fromstring(chart([found, found]))
    texts = [element.text or "" for element in drawing.iter() if element.tag.endswith("text")]
    assert texts.count("<b>: unet_small, corpus tar") == 2
    assert "8.00 (0.80)" in texts
    lengths = [float(e.get("width", 0)) for e in drawing.iter() if e.get("class") in ("ours", "limit", "peer")]
    assert lengths[1] / lengths[0] == pytest.approx(0.8, abs=0.01)


def test_cells() -> None:
    assert {cell.model["name"] for cell in CELLS.values()} >= {"unet_small", "null_model", "fcn_resnet50"}
    assert find_cell("mixed:null_model").corpus == "mixed"
    with pytest.raises(ConfigError, match="did you mean light"):
        find_cell("lihgt")
    with pytest.raises(UnknownModelError):
        find_cell("tar:nothing_such")
