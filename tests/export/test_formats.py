"""Every format gives back the masks of the table, through its consumer's own loader where that is installed."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from export_helpers import SCENES, SPACE, files_of, mask_of, png_array, run_export, scene_table
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from pipeline.config import WebdatasetSource
from pipeline.export.id_png import label_ids, train_ids
from pipeline.export.registry import FORMATS
from pipeline.export.runlengths import decode_brush, decode_runs
from pipeline.export.voc import voc_classes, voc_palette
from pipeline.masks import decode_depth, decode_panoptic_png, decode_rle
from pipeline.sources.base import Sample, read_unit
from pipeline.sources.webdataset import Webdataset
from pipeline.targets import read_label_map
from pipeline.taxonomy import load_taxonomy

Rows = dict[str, dict[str, Any]]
TASKS = ("semantic", "instance", "detection", "panoptic", "depth")
WIDTH, HEIGHT = SCENES.width, SCENES.height


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Rows]]:
    """Tables of ten scenes, one failed, by task."""
    root = tmp_path_factory.mktemp("tables")
    return {task: (root / task, scene_table(root / task, task)) for task in TASKS}


def label_of(row: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    return read_label_map(row["semantic"]["data"], max_pixels=10**6)


def masks_of(row: Mapping[str, Any]) -> list[tuple[int, np.ndarray[Any, Any]]]:
    """(category id, mask) of a row's segments, or of the classes of its label map."""
    if row.get("segments") is not None:
        found = row["segments"]
        return [(one["category_id"], decode_rle(one["rle"], width=WIDTH, height=HEIGHT)) for one in found]
    label_HW = label_of(row)
    return [(int(value), label_HW == value) for value in np.unique(label_HW) if value in SPACE.by_id]


def names_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for row in pq.read_table(folder / "names.parquet").to_pylist()}


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_coco_gives_the_same_masks_to_pycocotools(tables: Any, tmp_path: Path, task: str) -> None:
    table, rows = tables[task]
    assert run_export(table, "coco", tmp_path, "rows_per_piece=4") == 0
    coco = COCO(str(tmp_path / "annotations/instances.json"))
    assert [annotation["id"] for annotation in coco.dataset["annotations"]] == [*range(1, len(coco.anns) + 1)]
    assert len(coco.imgs) == len(rows)
    for number, image in coco.imgs.items():
        found = coco.loadAnns(coco.getAnnIds([number]))
        expected = masks_of(rows[image["maskmill_image_id"]])
        assert [annotation["category_id"] for annotation in found] == [category for category, _ in expected]
        for annotation, (_, mask_HW) in zip(found, expected, strict=True):
            assert (coco.annToMask(annotation) == mask_HW).all()
            assert annotation["area"] == mask_HW.sum()
    (failed,) = json.loads((tmp_path / "failed.json").read_text())
    assert (failed["error_type"], failed["error_message"]) == ("CorruptImageError", "bad 3")


def iou(a: Any, b: Any) -> float:
    return float(np.count_nonzero(a & b) / max(1, np.count_nonzero(a | b)))


def test_coco_polygons_and_what_they_lose(tables: Any, tmp_path: Path) -> None:
    table, rows = tables["instance"]
    ious = {}
    for tolerance in (0, 1):
        out = tmp_path / str(tolerance)
        assert run_export(table, "coco", out, "polygons=true", f"tolerance={tolerance}") == 0
        coco = COCO(str(out / "annotations/instances.json"))
        ious[tolerance] = [
            iou(coco.annToMask(annotation).astype(bool), mask_HW)
            for number, image in coco.imgs.items()
            for annotation, (_, mask_HW) in zip(
                coco.loadAnns(coco.getAnnIds([number])), masks_of(rows[image["maskmill_image_id"]]), strict=True
            )
        ]
    # Outlines along the edges of pixels are exact in COCO's own rasteriser.
    assert min(ious[0]) == 1.0
    assert 0.8 < np.mean(ious[1]) < 1.0


def test_coco_boxes_of_a_detector_have_no_masks(tables: Any, tmp_path: Path) -> None:
    table, rows = tables["detection"]
    assert run_export(table, "coco", tmp_path) == 0
    tree = json.loads((tmp_path / "annotations/instances.json").read_text())
    assert len(tree["annotations"]) == sum(len(row["segments"]) for row in rows.values())
    assert all("segmentation" not in annotation for annotation in tree["annotations"])


def test_coco_panoptic_follows_the_rules_of_panopticapi(tables: Any, tmp_path: Path) -> None:
    table, rows = tables["panoptic"]
    assert run_export(table, "coco_panoptic", tmp_path, "rows_per_piece=4") == 0
    tree = json.loads((tmp_path / "annotations/panoptic.json").read_text())
    images = {image["id"]: image for image in tree["images"]}
    assert len(tree["annotations"]) == len(images) == len(rows)
    categories = {category["id"] for category in tree["categories"]}
    for annotation in tree["annotations"]:
        data = (tmp_path / "annotations/panoptic" / annotation["file_name"]).read_bytes()
        segment_HW = decode_panoptic_png(data, width=WIDTH, height=HEIGHT)
        segments = annotation["segments_info"]
        assert {one["id"] for one in segments} == set(np.unique(segment_HW).tolist()) - {0}
        assert all(one["area"] == (segment_HW == one["id"]).sum() for one in segments)
        assert {one["category_id"] for one in segments} <= categories
        row = rows[images[annotation["image_id"]]["maskmill_image_id"]]
        for one in row["segments"]:
            assert ((segment_HW == one["id"]) == decode_rle(one["rle"], width=WIDTH, height=HEIGHT)).all()


def test_id_pngs_are_the_label_maps(tables: Any, tmp_path: Path) -> None:
    table, rows = tables["semantic"]
    assert run_export(table, "id_png", tmp_path, "images=true") == 0
    for image_id, row in names_of(tmp_path).items():
        data = (tmp_path / f"gtFine/{row['name']}_gtFine_labelIds.png").read_bytes()
        assert (png_array(data) == label_of(rows[image_id])).all()
        image = Image.open(tmp_path / f"leftImg8bit/{row['name']}_leftImg8bit.png")
        assert image.size == (WIDTH, HEIGHT)


def test_ids_of_cityscapes() -> None:
    train, label = load_taxonomy("cityscapes19"), load_taxonomy("cityscapes34")
    to_label, to_train = label_ids(train), train_ids(label)
    own = train_ids(train)
    assert to_train is not None
    assert own is not None
    # labels.py of cityscapesScripts: road 7/0, car 26/13, bicycle 33/18; unlabeled is 0/255.
    assert [int(to_label[i]) for i in (0, 13, 18, 255)] == [7, 26, 33, 0]
    assert [int(to_train[i]) for i in (7, 26, 33, 0, 4, 255)] == [0, 13, 18, 255, 255, 255]
    assert own[:19].tolist() == [*range(19)]
    assert int(label_ids(label)[255]) == 0
    assert train_ids(SPACE) is None


def test_instance_ids_are_class_times_1000(tables: Any, tmp_path: Path) -> None:
    table, rows = tables["panoptic"]
    assert run_export(table, "id_png", tmp_path) == 0
    for image_id, row in names_of(tmp_path).items():
        folder = tmp_path / "gtFine"
        instance_HW = png_array((folder / f"{row['name']}_gtFine_instanceIds.png").read_bytes()).astype(int)
        seen = set()
        for category, mask_HW in masks_of(rows[image_id]):
            (value,) = np.unique(instance_HW[mask_HW])
            assert value not in seen or SPACE.by_id[category].kind == "stuff"
            seen.add(value)
            assert value == category or value // 1000 == category


def test_voc_palettes_and_boxes(tables: Any, tmp_path: Path) -> None:
    table, rows = tables["instance"]
    assert run_export(table, "voc", tmp_path) == 0
    classes = voc_classes(SPACE)
    assert voc_palette()[15] == (192, 128, 128)  # person, in VOC's own colour map
    lines = (tmp_path / "labelmap.txt").read_text().splitlines()[1:]
    listed = (tmp_path / "ImageSets/Segmentation/default.txt").read_text().split()
    for image_id, row in names_of(tmp_path).items():
        assert row["name"] in listed
        class_HW = np.asarray(Image.open(tmp_path / f"SegmentationClass/{row['name']}.png"))
        object_HW = np.asarray(Image.open(tmp_path / f"SegmentationObject/{row['name']}.png"))
        seen_HW = np.zeros((HEIGHT, WIDTH), bool)
        for place, (category, mask_HW) in enumerate(masks_of(rows[image_id]), 1):
            own_HW = mask_HW & ~seen_HW  # the best lies on top
            seen_HW |= mask_HW
            assert (class_HW[own_HW] == classes.index(category)).all()
            assert (object_HW[own_HW] == place).all()
            assert lines[classes.index(category)].startswith(f"{SPACE.by_id[category].name}:")
        assert (class_HW[~seen_HW] == 0).all()
        boxes = ElementTree.parse(tmp_path / f"Annotations/{row['name']}.xml").findall("object")
        for box, one in zip(boxes, rows[image_id]["segments"], strict=True):
            corners = [float(box.findtext(f"bndbox/{key}") or "nan") for key in ("xmin", "ymin", "xmax", "ymax")]
            x, y, w, h = one["bbox"]
            assert corners == [x + 1, y + 1, x + w, y + h]


def test_yolo_polygons(tables: Any, tmp_path: Path) -> None:
    table, rows = tables["instance"]
    assert run_export(table, "yolo", tmp_path) == 0
    names = yaml.safe_load((tmp_path / "data.yaml").read_text())["names"]
    drawn = []
    for image_id, row in names_of(tmp_path).items():
        lines = (tmp_path / f"labels/{row['name']}.txt").read_text().splitlines()
        for line, (category, mask_HW) in zip(lines, masks_of(rows[image_id]), strict=True):
            place, *numbers = line.split()
            assert names[int(place)] == SPACE.by_id[category].name
            ring = np.array(numbers, float).reshape(-1, 2)
            assert ring.min() >= 0
            assert ring.max() <= 1
            points = (ring * (WIDTH, HEIGHT)).astype(int)
            assert mask_HW[points[:, 1], points[:, 0]].all()
            canvas = Image.new("1", (WIDTH, HEIGHT))
            ImageDraw.Draw(canvas).polygon([tuple(point) for point in points.tolist()], fill=1)
            drawn.append(iou(np.asarray(canvas), mask_HW))
    assert np.mean(drawn) > 0.97
    assert np.mean(np.array(drawn) == 1) > 0.8  # the others have bridges


def test_supervision_reads_yolo_and_voc(tables: Any, tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    table, rows = tables["instance"]
    assert run_export(table, "yolo", tmp_path / "yolo") == 0
    assert run_export(table, "voc", tmp_path / "voc") == 0
    yolo = supervision.DetectionDataset.from_yolo(
        images_directory_path=str(tmp_path / "yolo/images"),
        annotations_directory_path=str(tmp_path / "yolo/labels"),
        data_yaml_path=str(tmp_path / "yolo/data.yaml"),
        force_masks=True,
    )
    voc = supervision.DetectionDataset.from_pascal_voc(
        images_directory_path=str(tmp_path / "voc/JPEGImages"),
        annotations_directory_path=str(tmp_path / "voc/Annotations"),
    )
    ids = {row["name"]: image_id for image_id, row in names_of(tmp_path / "yolo").items()}
    ious = []
    for path, _, found in yolo:
        expected = masks_of(rows[ids[Path(path).stem]])
        assert [yolo.classes[place] for place in found.class_id] == [SPACE.by_id[c].name for c, _ in expected]
        ious += [iou(np.asarray(got), mask_HW) for got, (_, mask_HW) in zip(found.mask, expected, strict=True)]
    print(f"YOLO through supervision: mean IoU {np.mean(ious):.4f}")
    assert np.mean(ious) > 0.97
    for path, _, found in voc:
        expected_boxes = [one["bbox"] for one in rows[ids[Path(path).stem]]["segments"]]
        assert len(found) == len(expected_boxes)
        for (x1, y1, x2, y2), (x, y, w, h) in zip(found.xyxy, expected_boxes, strict=True):
            assert np.abs(np.array([x1, y1, x2, y2]) - (x, y, x + w, y + h)).max() <= 1


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic", "depth"])
def test_webdataset_is_a_source_again(tables: Any, tmp_path: Path, task: str) -> None:
    table, rows = tables[task]
    assert run_export(table, "webdataset", tmp_path, "images=true", "rows_per_piece=4") == 0
    source = Webdataset(WebdatasetSource(format="webdataset", uri=f"{tmp_path}/*.tar"))
    found = [item for unit in source.plan() for item in read_unit(source, unit, ()) if isinstance(item, Sample)]
    names = {row["name"]: image_id for image_id, row in names_of(tmp_path).items()}
    assert len(found) == len(rows)
    for sample in found:
        row = rows[names[sample.image_id.rpartition("/")[2]]]
        assert sample.error is None
        assert Image.open(io.BytesIO(sample.image)).size == (WIDTH, HEIGHT)
        if task == "semantic":
            assert (read_label_map(sample.targets["semantic"], max_pixels=10**6) == label_of(row)).all()
        elif task == "panoptic":
            segment_HW = decode_panoptic_png(sample.targets["panoptic"], width=WIDTH, height=HEIGHT)
            for one in row["segments"]:
                assert ((segment_HW == one["id"]) == decode_rle(one["rle"], width=WIDTH, height=HEIGHT)).all()
        elif task == "depth":
            codes_HW = read_label_map(sample.targets["depth"], max_pixels=10**6)
            depth_HW = decode_depth(row["depth"], width=WIDTH, height=HEIGHT)
            again_HW = codes_HW * row["depth"]["scale"] + row["depth"]["offset"]
            assert (codes_HW == 0).sum() == np.isnan(depth_HW).sum()
            assert np.nanmax(np.abs(again_HW - depth_HW)) < 1e-5
        else:
            annotations = json.loads(sample.targets["instances"])["annotations"]
            for one, (category, mask_HW) in zip(annotations, masks_of(row), strict=True):
                assert one["category_id"] == category
                assert (mask_of(one["segmentation"], WIDTH, HEIGHT) == mask_HW).all()


def test_webdataset_of_its_own_library(tables: Any, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    table, rows = tables["semantic"]
    assert run_export(table, "webdataset", tmp_path, "images=true") == 0
    shards = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(found) == len(rows)
    for sample in found:
        image_id = json.loads(sample["meta.json"])["image_id"]
        assert (png_array(sample["seg.png"]) == label_of(rows[image_id])).all()


def test_depth_in_millimetres(tables: Any, tmp_path: Path) -> None:
    table, rows = tables["depth"]
    assert run_export(table, "id_png", tmp_path, "depth_scale=0.001") == 0
    for image_id, row in names_of(tmp_path).items():
        codes_HW = png_array((tmp_path / f"depth/{row['name']}_depth.png").read_bytes())
        depth_HW = decode_depth(rows[image_id]["depth"], width=WIDTH, height=HEIGHT)
        near_HW = depth_HW < 65
        assert np.abs(codes_HW[near_HW] / 1000 - depth_HW[near_HW]).max() <= 0.00051
        assert (codes_HW[np.isnan(depth_HW)] == 0).all()
        meaning = json.loads((tmp_path / f"depth/{row['name']}_depth.json").read_text())
        assert meaning == {"scale": 0.001, "offset": 0.0, "kind": "metric_m", "invalid": 0}


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic", "depth"])
def test_hugging_face_loads_the_folder(tables: Any, tmp_path: Path, task: str) -> None:
    table, rows = tables[task]
    more = ("images=true", "rows_per_piece=4")
    assert run_export(table, "huggingface", tmp_path / "set", *more) == 0
    shards = sorted((tmp_path / "set/data").glob("*.parquet"))
    features = json.loads(pq.read_schema(shards[0]).metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert sum(pq.read_metadata(shard).num_rows for shard in shards) == len(rows)
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    loaded = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == len(rows)
    for sample in loaded:
        row = rows[sample["image_id"]]
        assert sample["image"].size == (WIDTH, HEIGHT)
        if task == "semantic":
            assert (np.asarray(sample["mask"]) == label_of(row)).all()
        elif task == "depth":
            assert np.asarray(sample["depth"]).max() == 65535
            assert sample["depth_coding"]["kind"] == "metric_m"
        else:
            names = loaded.features["objects"]["category"].feature.names
            for rle, place, (category, mask_HW) in zip(
                sample["objects"]["rle"], sample["objects"]["category"], masks_of(row), strict=True
            ):
                assert names[place] == SPACE.by_id[category].name
                assert (decode_rle(rle, width=WIDTH, height=HEIGHT) == mask_HW).all()


def test_cvat_masks_polygons_and_boxes(tables: Any, tmp_path: Path) -> None:
    table, rows = tables["instance"]
    for name, more in (("mask", ()), ("polygon", ("polygons=true",))):
        assert run_export(table, "cvat", tmp_path / name, *more) == 0
        images = ElementTree.parse(tmp_path / name / "annotations.xml").findall("image")
        ids = {row["file_name"]: image_id for image_id, row in names_of(tmp_path / name).items()}
        assert len(images) == len(rows)
        for image in images:
            expected = masks_of(rows[ids[image.attrib["name"]]])
            if name == "mask":
                orders = []
                for element, (category, mask_HW) in zip(image.findall("mask"), expected, strict=True):
                    left, top, width, height = (int(element.attrib[key]) for key in ("left", "top", "width", "height"))
                    runs = np.array(element.attrib["rle"].split(","), np.int64)
                    got_HW = np.zeros((HEIGHT, WIDTH), bool)
                    got_HW[top : top + height, left : left + width] = decode_runs(runs, width=width, height=height)
                    assert (got_HW == mask_HW).all()
                    assert element.attrib["label"] == SPACE.by_id[category].name
                    orders.append(int(element.attrib["z_order"]))
                assert orders == sorted(orders, reverse=True)
            else:
                assert len(image.findall("polygon")) >= len(expected)
    assert run_export(tables["detection"][0], "cvat", tmp_path / "box") == 0
    boxes = ElementTree.parse(tmp_path / "box/annotations.xml").findall("image/box")
    assert len(boxes) == sum(len(row["segments"]) for row in tables["detection"][1].values())


def test_label_studio_brushes(tables: Any, tmp_path: Path) -> None:
    table, rows = tables["instance"]
    assert run_export(table, "label_studio", tmp_path, "image_root=s3://bucket/") == 0
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    labels = {element.attrib["value"] for element in ElementTree.parse(tmp_path / "label_config.xml").iter("Label")}
    assert labels == {category.name for category in SPACE.categories}
    assert len(tasks) == len(rows)
    strokes = []
    for task in tasks:
        image_id = task["data"]["maskmill_image_id"]
        assert task["data"]["image"] == f"s3://bucket/{image_id}"
        expected = masks_of(rows[image_id])
        results = task["predictions"][0]["result"] if expected else []
        for result, (category, mask_HW) in zip(results, expected, strict=True):
            data = np.array(result["value"]["rle"], np.uint8)
            assert (decode_brush(data, width=WIDTH, height=HEIGHT) == mask_HW).all()
            assert result["value"]["brushlabels"] == [SPACE.by_id[category].name]
            strokes.append((result["value"]["rle"], mask_HW))
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="label-studio-sdk is not installed")
    for rle, mask_HW in strokes:
        values = np.asarray(brush.decode_rle(rle)).reshape(HEIGHT, WIDTH, 4)
        assert ((values[..., 3] > 0) == mask_HW).all()
        again = np.array(brush.mask2rle(mask_HW.astype(np.uint8) * 255), np.uint8)
        assert (decode_brush(again, width=WIDTH, height=HEIGHT) == mask_HW).all()


@pytest.mark.parametrize("task", ["semantic", "instance", "depth"])
def test_fiftyone_reads_the_samples(tables: Any, tmp_path: Path, task: str) -> None:
    table, rows = tables[task]
    assert run_export(table, "fiftyone", tmp_path) == 0
    samples = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert len(samples) == len(rows)
    assert all((tmp_path / sample["filepath"]).is_file() for sample in samples)
    importers = pytest.importorskip("fiftyone.utils.data.importers", reason="fiftyone is not installed")
    # The importer that `Dataset.from_dir` uses; the samples that it gives need no database.
    importer = importers.LegacyFiftyOneDatasetImporter(str(tmp_path))
    with importer:
        for sample in importer:
            row = rows[sample["maskmill_image_id"]]
            assert Path(sample.filepath).is_file()
            if task == "semantic":
                mask_HW = png_array(Path(sample["segmentation"].mask_path).read_bytes())
                assert (mask_HW == label_of(row)).all()
            elif task == "depth":
                assert Path(sample["depth"].map_path).is_file()
            else:
                for found, (category, mask_HW) in zip(sample["detections"].detections, masks_of(row), strict=True):
                    assert found.label == SPACE.by_id[category].name
                    left, top = (round(found.bounding_box[i] * side) for i, side in enumerate((WIDTH, HEIGHT)))
                    got_HW = np.zeros((HEIGHT, WIDTH), bool)
                    height, width = found.mask.shape
                    got_HW[top : top + height, left : left + width] = found.mask
                    assert (got_HW == mask_HW).all()


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_says_what_it_cannot_carry_and_writes_nothing(
    tables: Any, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in TASKS:
        if task in FORMATS[form].tasks:
            continue
        out = tmp_path / task
        assert run_export(tables[task][0], form, out) == 2
        assert f"the rows of m are {task}" in capsys.readouterr().err
        assert not out.exists() or not files_of(out)
