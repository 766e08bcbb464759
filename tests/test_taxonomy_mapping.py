"""Mapping one label space onto another: by id, merge list, name and alias; what is left over is listed."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, TargetMismatchError
from pipeline.taxonomy import Taxonomy, build_taxonomy, bundled_taxonomies, load_taxonomy
from pipeline.taxonomy_mapping import map_taxonomy


def taxonomy(**names: int) -> Taxonomy:
    return build_taxonomy(
        {
            "name": "t",
            "source": "here",
            "categories": [
                {"id": number, "name": name.replace("_", " "), "kind": "stuff", "color": [0, 0, 0]}
                for name, number in names.items()
            ],
        },
        "here",
    )


COCO, VOC, CAMVID, CITY = (load_taxonomy(name) for name in ("coco_panoptic", "voc21", "camvid11", "cityscapes19"))


def names(source: Taxonomy, target: Taxonomy, **rules: Any) -> dict[str, str]:
    return dict(map_taxonomy(source, target, **rules).describe()["mapped"])


def test_coco_on_voc_by_names_and_aliases() -> None:
    mapping = map_taxonomy(load_taxonomy("coco80"), VOC)
    found = mapping.describe()["mapped"]
    assert len(found) == 20
    assert (found["airplane"], found["couch"], found["tv"]) == ("aeroplane", "sofa", "tvmonitor")
    assert (found["motorcycle"], found["potted plant"]) == ("motorbike", "pottedplant")
    assert [c.name for c in mapping.unused] == ["background"]
    assert len(mapping.unmapped) == 60
    assert (mapping.lookup[5], mapping.lookup[8], mapping.lookup.dtype) == (1, 255, np.uint16)
    background = map_taxonomy(load_taxonomy("coco80"), VOC, other="background")
    assert (background.lookup[8], background.unused, background.describe()["unmapped_become"]) == (0, (), "background")


def test_coco_on_camvid_with_merge_lists() -> None:
    merge = {"Tree": ["tree-merged", "grass-merged"], "SignSymbol": ["stop sign", 10], "Bicyclist": []}
    found = names(COCO, CAMVID, merge=merge)
    assert found == {
        "person": "Pedestrian",
        "car": "Car",
        "road": "Road",
        "sky-other-merged": "Sky",
        "building-other-merged": "Building",
        "fence-merged": "Fence",
        "pavement-merged": "Pavement",
        "tree-merged": "Tree",
        "grass-merged": "Tree",
        "stop sign": "SignSymbol",
        "traffic light": "SignSymbol",
    }


def test_rules_go_before_names() -> None:
    source, target = taxonomy(car=0, van=1, bus=2), taxonomy(car=5, bus=6, other=7)
    assert map_taxonomy(source, target).pairs == {0: 5, 2: 6}
    # A merge list says all that its class takes.
    assert map_taxonomy(source, target, merge={"car": ["van"]}).pairs == {1: 5, 2: 6}
    assert map_taxonomy(source, target, merge={"car": ["van", "car"]}).pairs == {0: 5, 1: 5, 2: 6}
    assert map_taxonomy(source, target, ids={0: 7}).pairs == {0: 7, 2: 6}
    assert map_taxonomy(source, target, other=7).lookup[:4].tolist() == [5, 7, 6, 255]


def test_names_are_compared_without_case_spaces_and_hyphens() -> None:
    source = taxonomy(Traffic_Light=0, dining_table=1)
    target = build_taxonomy({**taxonomy(traffic_light=3, diningtable=4).describe()}, "here")
    assert map_taxonomy(source, target).pairs == {0: 3, 1: 4}


def test_an_exact_name_goes_before_an_alias() -> None:
    target = taxonomy(sofa=1, couch=2, car=3)
    assert map_taxonomy(taxonomy(couch=9, car=8), target).pairs == {8: 3, 9: 2}
    with pytest.raises(ConfigError, match="tv of t is television or tvmonitor of t; say which"):
        map_taxonomy(taxonomy(tv=9), taxonomy(television=1, tvmonitor=2))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"merge": {"persn": ["person"]}}, "did you mean person"),
        ({"merge": {"person": ["zebraa"]}}, "merge.person: coco_panoptic has no class 'zebraa'; did you mean zebra"),
        ({"merge": {"person": "car"}}, "must be a list"),
        ({"merge": {"person": ["car"], "cat": ["car"]}}, "car is mapped to person as well"),
        ({"ids": {3: 7}, "merge": {"cat": ["car"]}}, "car is mapped to car as well"),
        ({"ids": {1: 99}}, "has no id 99"),
        ({"ids": {12: 1}}, "has no id 12"),
        ({"other": "nothing"}, "other: voc21 has no class 'nothing'"),
        ({"other": True}, "no class 'True'"),
    ],
)
def test_rules_that_name_no_class(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        map_taxonomy(COCO, VOC, **rules)


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(ConfigError, match="no class in common"):
        map_taxonomy(taxonomy(a=1), taxonomy(b=1))
    twice = build_taxonomy({"name": "t", "source": "s", "categories": [
        {"id": number, "name": "a", "kind": "stuff", "color": [0, 0, 0]} for number in (1, 2)
    ]}, "here")  # fmt: skip
    with pytest.raises(ConfigError, match="give its id"):
        map_taxonomy(taxonomy(a=1), twice, merge={"a": ["a"]})


def test_label_maps() -> None:
    mapping = map_taxonomy(CAMVID, CITY)
    # 11 is CamVid's own void, 255 ours; Tree has no class of its own in Cityscapes.
    label_HW = np.array([[0, 3, 9], [11, 255, 5]], np.uint8)
    mapped_HW = mapping.apply(label_HW)
    assert mapped_HW.dtype == np.uint8
    assert mapped_HW.tolist() == [[10, 0, 11], [255, 255, 255]]
    for bad in ([[12]], [[-1]], [[70000]]):
        with pytest.raises(TargetMismatchError, match="camvid11"):
            mapping.apply(np.array(bad, np.int32))
    assert mapping.apply(np.zeros((0, 3), np.uint8)).shape == (0, 3)


def test_segments() -> None:
    mapping = map_taxonomy(COCO, VOC)
    assert mapping.apply_ids([1, 5, 8, 255]).tolist() == [15, 1, 255, 255]
    assert mapping.apply_ids([]).tolist() == []
    for bad in ([12], [-1], [1 << 16]):
        with pytest.raises(TargetMismatchError, match="coco_panoptic"):
            mapping.apply_ids(bad)


def test_large_ids_are_mapped_in_16_bits() -> None:
    source, target = taxonomy(a=300, b=60000), taxonomy(a=1000, c=2)
    mapping = map_taxonomy(source, target)
    mapped = mapping.apply(np.array([[300, 60000, 65535]], np.uint16))
    assert (mapped.dtype, mapped.tolist()) == (np.uint16, [[1000, 65535, 65535]])


# `objects` has one class, which is none of the others'.
CLASSES = [name for name in bundled_taxonomies() if name != "objects"]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(CLASSES), st.sampled_from(CLASSES), st.integers(0, 2**32))
def test_every_class_goes_somewhere_and_is_listed(source_name: str, target_name: str, seed: int) -> None:
    source, target = load_taxonomy(source_name), load_taxonomy(target_name)
    mapping = map_taxonomy(source, target)
    described = mapping.describe()
    assert sorted([*described["mapped"], *described["unmapped"]]) == sorted(c.name for c in source.categories)
    assert {*described["mapped"].values()} | {*described["unused"]} == {c.name for c in target.categories}
    label_HW = np.random.default_rng(seed).choice([*source.ids, source.void_id], (9, 9)).astype(np.uint16)
    mapped_HW = mapping.apply(label_HW)
    np.testing.assert_array_equal(mapped_HW.ravel(), mapping.apply_ids(label_HW.ravel()))
    assert set(np.unique(mapped_HW).tolist()) <= {*target.ids, target.void_id}
