"""The pictures of a report: the right images, found in the source again, beside their predictions."""

from pathlib import Path

import numpy as np
import pytest
from report_helpers import LABELLED, TASK_SPACE, describe, label_rows, write_run, write_table

from pipeline.config import ScoreConfig
from pipeline.errors import ConfigError, StorageError
from pipeline.report.pictures import report_pictures
from pipeline.report.report import ReportOptions, write_page, write_report
from pipeline.report.rows import ScoredTable, open_scored

OPTIONS = ReportOptions(replicates=0, images=2)
PANELS = ["image", "target", "prediction", "error"]


@pytest.fixture
def labelled(tmp_path: Path) -> ScoredTable:
    config = {"source": LABELLED.model_dump(mode="json"), "score": ScoreConfig().model_dump(mode="json")}
    uri = write_table(tmp_path / "labels", label_rows(), taxonomy=TASK_SPACE, cuts=[4, 8], config=config)
    return open_scored(uri, {})[0]


def test_worst_and_best_images(labelled: ScoredTable) -> None:
    uri = f"{labelled.table.uri}/_report"
    report = write_report(labelled, uri, {}, OPTIONS)
    pictures = report_pictures(report, labelled, {})
    figures = ("semantic.mIoU", "depth.AbsRel")
    assert list(pictures) == [f"{end}:{figure}" for figure in figures for end in ("worst", "best")]
    for key, found in pictures.items():
        end, figure = key.split(":")
        entries = report[end][figure]
        assert [picture.caption for picture in found] == [entry["image_id"] for entry in entries]
        assert [picture.value for picture in found] == [entry["value"] for entry in entries]
        assert [[panel.name for panel in picture.panels] for picture in found] == [PANELS] * 2
        assert [picture.note for picture in found] == [""] * 2
    assert report["best"]["semantic.mIoU"][0]["value"] == 1
    assert report["worst"]["semantic.mIoU"][0]["image_id"].endswith("9")
    write_page(report, pictures, labelled, uri, {})
    page = (Path(uri) / "index.html").read_text()
    assert page.count("data:image/webp") >= 4 * len(PANELS)


def test_scores_of_a_table_elsewhere(labelled: ScoredTable, tmp_path: Path) -> None:
    rows = [{name: value for name, value in stored.items() if name != "semantic"} for stored in label_rows()]
    config = dict(labelled.run["config"]) | {"predictions": {"uri": labelled.table.uri, "storage": {"key": "***"}}}
    uri = write_table(tmp_path / "scores", rows, job="evaluate", taxonomy=TASK_SPACE, config=config)
    scored = open_scored(uri, {})[0]
    report = write_report(scored, f"{uri}/_report", {}, OPTIONS)
    for picture in report_pictures(report, scored, {})["worst:semantic.mIoU"]:
        assert [panel.name for panel in picture.panels] == PANELS
    moved = {"predictions": {"uri": str(tmp_path / "nowhere")}}
    with pytest.raises(StorageError, match="nowhere"):
        report_pictures(report, scored, moved)


def test_images_that_the_source_has_no_more(labelled: ScoredTable) -> None:
    report = write_report(labelled, f"{labelled.table.uri}/_report", {}, OPTIONS)
    pictures = report_pictures(report, labelled, {"source": {"count": 5}})
    worst, best = pictures["worst:semantic.mIoU"], pictures["best:semantic.mIoU"]
    assert all("not in the source" in picture.note and not picture.panels for picture in worst)
    assert all(len(picture.panels) == 4 for picture in best)


def test_runs_that_say_too_little(labelled: ScoredTable) -> None:
    uri = labelled.table.uri
    report = write_report(labelled, f"{uri}/_report", {}, OPTIONS)
    model = describe("m", TASK_SPACE)
    for config, message in (({}, "does not say what the source was"), ({"source": {"format": "x"}}, "not a source")):
        write_run(uri, job="label", models=[model], config=config)
        with pytest.raises(ConfigError, match=message):
            report_pictures(report, open_scored(uri, {})[0], {})
    write_run(uri, job="label", models=[model], config={**labelled.run["config"], "score": {"ignore": "all"}})
    with pytest.raises(ConfigError, match="does not hold a config"):
        report_pictures(report, open_scored(uri, {})[0], {})
    assert report_pictures({**report, "worst": {}, "best": {}}, labelled, {}) == {}
    assert np.isfinite([entry["value"] for entry in report["worst"]["semantic.mIoU"]]).all()
