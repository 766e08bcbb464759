"""The bundled label spaces hold what their sources say."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.taxonomy import bundled_taxonomies, load_taxonomy
from pipeline.taxonomy_mapping import map_taxonomy

# Train id, label id and name of mcordts/cityscapesScripts' labels.py.
CITYSCAPES = {
    0: (7, "road"), 1: (8, "sidewalk"), 2: (11, "building"), 3: (12, "wall"), 4: (13, "fence"), 5: (17, "pole"),
    6: (19, "traffic light"), 7: (20, "traffic sign"), 8: (21, "vegetation"), 9: (22, "terrain"), 10: (23, "sky"),
    11: (24, "person"), 12: (25, "rider"), 13: (26, "car"), 14: (27, "truck"), 15: (28, "bus"), 16: (31, "train"),
    17: (32, "motorcycle"), 18: (33, "bicycle"),
}  # fmt: skip
CAMVID = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip


def test_coco_panoptic_is_the_data_sets(shared_data: Path) -> None:
    official = json.loads((shared_data / "coco128" / "panoptic.json").read_text())["categories"]
    ours = {c.id: (c.name, c.kind == "thing") for c in load_taxonomy("coco_panoptic").categories}
    assert ours == {c["id"]: (c["name"], bool(c["isthing"])) for c in official}


def test_coco80_are_the_things_of_coco_panoptic(shared_data: Path) -> None:
    things = {c.id: c.name for c in load_taxonomy("coco_panoptic").categories if c.kind == "thing"}
    assert {c.id: c.name for c in load_taxonomy("coco80").categories} == things
    official = json.loads((shared_data / "coco128" / "instances.json").read_text())["categories"]
    assert {c["id"]: c["name"] for c in official} == things


def test_cityscapes_train_ids_are_the_evaluated_label_ids() -> None:
    labels, train = load_taxonomy("cityscapes34"), load_taxonomy("cityscapes19")
    assert {c.id: c.name for c in train.categories} == {number: name for number, (_, name) in CITYSCAPES.items()}
    assert train.by_id[13].color == (0, 0, 142)
    assert labels.ids == tuple(range(34))
    for number, (label, name) in CITYSCAPES.items():
        same = (labels.by_id[label].name, labels.by_id[label].kind, labels.by_id[label].color)
        assert same == (name, train.by_id[number].kind, train.by_id[number].color)
    mapping = map_taxonomy(labels, train)
    assert mapping.pairs == {label: number for number, (label, _) in CITYSCAPES.items()}
    assert [c.name for c in mapping.unmapped][:3] == ["unlabeled", "ego vehicle", "rectification border"]


def test_camvid_is_the_data_sets(shared_data: Path) -> None:
    taxonomy = load_taxonomy("camvid11")
    assert [c.name for c in taxonomy.categories] == list(CAMVID)
    known = {*taxonomy.ids, *taxonomy.void_ids}
    folder = next(path for path in sorted((shared_data / "camvid").rglob("*annot")) if path.is_dir())
    for path in sorted(folder.glob("*.png"))[:5]:
        assert set(np.unique(np.asarray(Image.open(path))).tolist()) <= known


@pytest.mark.parametrize(
    ("number", "name", "color", "kind"),
    [
        (1, "wall", (120, 120, 120), "stuff"),
        (13, "person", (150, 5, 61), "thing"),
        (24, "sofa", (11, 102, 255), "thing"),
        (55, "runway", (153, 255, 0), "stuff"),
        (150, "flag", (92, 0, 255), "thing"),
    ],
)
def test_ade20k_by_sample(number: int, name: str, color: tuple[int, int, int], kind: str) -> None:
    taxonomy = load_taxonomy("ade20k150")
    found = taxonomy.by_id[number]
    assert (found.name, found.kind, found.color) == (name, kind, color)
    assert taxonomy.ids == tuple(range(1, 151))
    assert taxonomy.void_ids == (0,)


@pytest.mark.parametrize("name", bundled_taxonomies())
def test_every_class_maps_to_itself(name: str) -> None:
    # So no alias joins two classes of one space.
    taxonomy = load_taxonomy(name)
    mapping = map_taxonomy(taxonomy, taxonomy)
    assert mapping.pairs == {number: number for number in taxonomy.ids}
    assert not mapping.unused
