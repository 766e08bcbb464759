"""`maskmill evaluate`: equal to in-pass scores, resumable, and what does not fit is never lost."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltalake import DeltaTable
from job_helpers import png, rows_of, run_evaluate, run_json, run_label
from PIL import Image

from jobs import pack, report, status
from pipeline.metrics.confusion import Confusion
from pipeline.metrics.detection import Detection
from pipeline.metrics.panoptic import PanopticState
from pipeline.sources.scenes import render_scene
from pipeline.taxonomy import build_taxonomy

UNET = ("models.0.name=unet_small", "models.0.weights=bundled:unet_small_scenes")
SCENES = ("source.format=scenes", "source.count=30", "source.unit_images=8", "source.width=96", "source.height=64")
SMALL = ("resources.torch_threads=1", "resources.decode_threads=2", "output.rows_per_file=5")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 scenes, labelled and scored in one pass."""
    folder = tmp_path_factory.mktemp("labelled")
    assert run_label(*SCENES, *UNET, *SMALL, f"output.uri={folder}") == 0
    return folder


def merged(rows: list[dict[str, Any]]) -> Confusion:
    states = [Confusion.from_row(row["score"]["confusion"]) for row in rows]
    total = states[0]
    for state in states[1:]:
        total = total.merge(state)
    return total


def test_scores_in_pass_equal_scores_afterwards(labelled: Path) -> None:
    in_pass = rows_of(labelled, ["image_id", "model", "status", "score"])
    assert all(row["status"] == "ok" and row["score"]["confusion"] for row in in_pass)
    assert run_evaluate(*SCENES, f"predictions.uri={labelled}", "output.rows_per_file=7") == 0
    after = rows_of(labelled / "_scores")
    assert [(row["image_id"], row["score"]) for row in after] == [(row["image_id"], row["score"]) for row in in_pass]
    assert {(row["status"], row["prediction"] == row["image_id"]) for row in after} == {("ok", True)}
    figures = merged(in_pass).compute()
    assert figures["mIoU"] > 0.3  # it was trained on scenes
    model = run_json(labelled / "_scores")["models"][0]
    assert model["version"].startswith(model["prediction_version"] + ".")
    assert build_taxonomy(model["score_taxonomy"], "run.json").name == "scenes"


def test_scores_are_what_the_stored_masks_and_targets_say(labelled: Path) -> None:
    rows = rows_of(labelled)
    total = np.zeros((256, 256), np.int64)
    for index, row in enumerate(rows):
        pred_HW = np.asarray(Image.open(io.BytesIO(row["semantic"]["data"])))
        target_HW = render_scene(index, width=96, height=64).semantic_HW
        np.add.at(total, (target_HW.ravel(), pred_HW.ravel()), 1)
    assert (merged(rows).matrix[:, :-1] == total[:8, :8]).all()


def test_nothing_left_to_score_and_other_options_are_other_rows(labelled: Path, capsys: Any) -> None:
    arguments = (*SCENES, f"predictions.uri={labelled}")
    assert run_evaluate(*arguments) == 0
    before = rows_of(labelled / "_scores")
    capsys.readouterr()
    assert run_evaluate(*arguments) == 0
    assert "nothing was left to score" in capsys.readouterr().err
    assert rows_of(labelled / "_scores") == before
    assert run_evaluate(*arguments, "score.boundary=false", "score.ignore=[7]") == 0
    rows = rows_of(labelled / "_scores")
    assert len(rows) == 2 * len(before)
    assert len({row["model_version"] for row in rows}) == 2
    assert status.main([str(labelled / "_scores"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["ok"] == 30


def test_a_row_that_came_later_is_scored_later(tmp_path: Path) -> None:
    few = [argument if "count" not in argument else "source.count=13" for argument in SCENES]
    assert run_label(*few, *UNET, *SMALL, f"output.uri={tmp_path}") == 0
    arguments = (*SCENES, f"predictions.uri={tmp_path}")
    assert run_evaluate(*arguments) == 0
    rows = rows_of(tmp_path / "_scores")
    missing = [row for row in rows if row["status"] == "failed"]
    assert (len(rows), len(missing)) == (30, 17)
    assert {(row["error_type"], row["error_stage"]) for row in missing} == {("MissingPredictionError", "match")}
    assert run_label(*SCENES, *UNET, *SMALL, f"output.uri={tmp_path}") == 0
    assert run_evaluate(*arguments) == 0
    assert {row["status"] for row in rows_of(tmp_path / "_scores")} == {"ok"}
    assert len(rows_of(tmp_path / "_scores")) == 30


def test_predictions_without_a_target_are_listed(labelled: Path, tmp_path: Path) -> None:
    few = [argument if "count" not in argument else "source.count=13" for argument in SCENES]
    output = f"output.uri={tmp_path}"
    assert run_evaluate(*few, f"predictions.uri={labelled}", output) == 0
    rows = rows_of(tmp_path)
    strangers = [row for row in rows if row["status"] == "failed"]
    assert (len(rows), len(strangers)) == (30, 17)
    assert {row["error_type"] for row in strangers} == {"MissingTargetError"}
    assert {row["image_id"] for row in rows} == {row["image_id"] for row in rows_of(labelled, ["image_id", "model"])}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of the same scenes as files, in another layout, one of them of another size and one of no scene."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for index in range(20):
        scene = render_scene(index, width=96, height=64)
        name = f"{'town' if index < 10 else 'shore'}/{index:09d}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(png(scene.semantic_HW if index != 5 else scene.semantic_HW[:-1]))
    (folder / "shore" / "000000777.png").write_bytes(png(render_scene(777, width=96, height=64).semantic_HW))
    return folder


def test_targets_of_another_source_by_name(labelled: Path, elsewhere: Path, tmp_path: Path) -> None:
    arguments = (
        "source.format=files",
        f"source.uri={elsewhere}",
        "source.images={town}/{id}.png",
        "source.targets.semantic={town}/{id}.png",
        f"predictions.uri={labelled}",
        f"output.uri={tmp_path}",
    )
    # Scores against another source, which must not stay beside these.
    assert run_evaluate(*SCENES, f"predictions.uri={labelled}", f"output.uri={tmp_path}") == 0
    assert run_evaluate(*arguments, "predictions.match=name") == 0
    rows = rows_of(tmp_path)
    kinds = {kind: [row for row in rows if row["error_type"] == kind] for kind in {row["error_type"] for row in rows}}
    assert {kind: len(found) for kind, found in kinds.items()} == {
        None: 19,
        "TargetMismatchError": 1,
        "MissingPredictionError": 1,
        "MissingTargetError": 10,
    }
    assert "96x63" in kinds["TargetMismatchError"][0]["error_message"]
    assert kinds["MissingPredictionError"][0]["image_id"] == "shore/000000777.png"
    assert {dict(row["fields"])["town"] for row in kinds[None]} == {"town", "shore"}
    in_pass = {row["image_id"].rpartition("/")[2]: row["score"] for row in rows_of(labelled)}
    for row in kinds[None]:
        assert row["score"] == in_pass[row["image_id"].rpartition("/")[2].removesuffix(".png")]
    with pytest.raises(AssertionError):  # by id there is nothing in common, and that is an error
        assert run_evaluate(*arguments[:-1], f"output.uri={tmp_path / 'by_id'}") == 0


def test_one_model_as_the_target_of_another(labelled: Path, tmp_path: Path) -> None:
    output = f"output.uri={tmp_path}"
    source = ("source.format=table", f"source.uri={labelled}")
    assert run_evaluate(*source, f"predictions.uri={labelled}", output) == 0
    rows = rows_of(tmp_path)
    assert len(rows) == 30
    assert merged(rows).compute()["mIoU"] == 1.0


def test_coco_results_equal_the_official_figures(shared_data: Path, tmp_path: Path) -> None:
    for kind in ("bbox", "segm"):
        folder = tmp_path / kind
        assert (
            run_evaluate(
                "source.format=coco",
                f"source.instances={shared_data / 'coco_ap' / 'instances_val2014_100.json'}",
                "predictions.format=coco",
                f"predictions.uri={shared_data / 'coco_ap' / f'instances_val2014_fake{kind}100_results.json'}",
                f"output.uri={folder}",
            )
            == 0
        )
        records = Detection.empty().merge(
            *[Detection.from_row(row["score"][kind]) for row in rows_of(folder) if row["status"] == "ok"]
        )
        figures = records.compute().figures()
        official = {"bbox": (0.5045806987, 0.6969727247), "segm": (0.3195452759, 0.5622883973)}[kind]
        assert (figures["AP"], figures["AP50"]) == pytest.approx(official, abs=1e-9)
        printed = (shared_data / "coco_ap" / "expected.txt").read_text().split(f"type={kind}")[1].split("type=")[0]
        expected = [float(line.rpartition("=")[2]) for line in printed.splitlines() if " = " in line]
        assert len(expected) == len(figures) == 12
        assert [*figures.values()] == pytest.approx(expected, abs=5.01e-4)


def test_panoptic_files_equal_the_official_figures(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "panoptic4"
    assert (
        run_evaluate(
            "source.format=coco",
            f"source.panoptic={folder / 'coco_gt.json'}",
            "predictions.format=panoptic",
            f"predictions.uri={folder / 'coco_pred.json'}",
            f"output.uri={tmp_path}",
        )
        == 0
    )
    rows = rows_of(tmp_path)
    assert {row["status"] for row in rows} == {"ok"}
    state = PanopticState.empty()
    for row in rows:
        state = state.merge(PanopticState.from_row(row["score"]["panoptic"]))
    taxonomy = build_taxonomy(run_json(tmp_path)["models"][0]["score_taxonomy"], "run.json")
    figures = state.compute(taxonomy)
    assert figures["All"]["PQ"] == pytest.approx(0.6740486629, abs=1e-9)
    assert figures["Things"]["PQ"] == pytest.approx(0.5769675073, abs=1e-9)
    assert figures["Stuff"]["PQ"] == pytest.approx(0.8682109740, abs=1e-9)
    assert len(DeltaTable(str(tmp_path)).to_pyarrow_table()) == 4


MODELS = '''
"""A model of each kind that looks at the image's colours: far from right, and right enough to be scored."""

import torch
from torch import nn

from pipeline.models.spec import ModelSpec, Preprocess


class Brightness(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return self.scale * (2.5 + image_BCHW.mean(dim=1, keepdim=True)) + 1.0


class Boxes(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, image_BCHW: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        found = []
        for image_CHW in image_BCHW:
            boxes = torch.tensor([[10.0, 30.0, 30.0, 50.0], [40.0, 30.0, 70.0, 55.0], [5.0, 5.0, 20.0, 20.0]])
            scores = torch.sigmoid(image_CHW.mean() * torch.tensor([1.0, 0.5, 0.2])) * 0.5 + 0.5
            labels = torch.tensor([5, 5, 6])
            found.append({"boxes": boxes, "scores": scores, "labels": labels, "masks": torch.full((3, 1, 28, 28), 0.9)})
        return found


PLAIN = Preprocess(pad_multiple=1)
DEPTH = ModelSpec(name="brightness", task="depth", build=Brightness, preprocess=PLAIN, taxonomy="scenes", license="x")
BOXES = ModelSpec(name="boxes", task="instance", build=Boxes, preprocess=PLAIN, taxonomy="scenes", license="x")
'''


def test_a_report_in_pass_equals_a_report_of_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Semantic, depth and instance models in one table, and a corrupt image."""
    (tmp_path / "scored_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    output, shards = tmp_path / "labels", tmp_path / "shards"
    assert pack.main([*SCENES, f"output.uri={shards}", "images_per_shard=9"]) == 0
    first = sorted(shards.glob("*.tar"))[0]
    data = first.read_bytes()
    at = data.index(b"\x89PNG")
    first.write_bytes(data[: at + 40] + bytes(60) + data[at + 100 :])  # one image's pixels are broken
    source = ("source.format=webdataset", f"source.uri={shards}")
    specs = ("models.1.spec=scored_models:DEPTH", "models.2.spec=scored_models:BOXES")
    options = ("score.depth.alignment=median", "score.depth.max_depth=80")
    arguments = (*source, *UNET, *specs, *SMALL, *options, "failure_budget=0.1", f"output.uri={output}")
    assert run_label(*arguments) == 0
    assert run_evaluate(*source, f"predictions.uri={output}", *options) == 0
    capsys.readouterr()
    reports = []
    for uri in (output, output / "_scores"):
        assert report.main([str(uri), "--json", "--no-page", "--by", "shard"]) == 0
        reports.append(json.loads(capsys.readouterr().out)["models"])
    for label in ("unet_small", "brightness", "boxes"):
        in_pass, after = reports[0][label], reports[1][label]
        assert in_pass["counts"] == after["counts"] == {"images": 30, "ok": 29, "failed": 1, **NOTHING_MISSING}
        same = [name for name in in_pass if name not in ("model", "run", "problems")]
        assert {name: in_pass[name] for name in same} == {name: after[name] for name in same}
        kinds = [[(p["outcome"], p["type"], p["count"]) for p in r["problems"]] for r in (in_pass, after)]
        assert kinds[0] == kinds[1] == [("failed", "CorruptImageError", 1)]
    assert reports[0]["unet_small"]["semantic"]["mIoU"] > 0.3
    assert 0 < reports[0]["brightness"]["depth"]["AbsRel"] < 5
    assert reports[0]["boxes"]["detection"].keys() == {"bbox", "segm"}


NOTHING_MISSING = {"missing_target": 0, "missing_prediction": 0}
