"""Ids become class indices and back; COCO's annotations become the masks that pycocotools draws, with their boxes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools.coco import COCO

from pipeline.errors import ConfigError, TargetMismatchError
from pipeline.masks import encode_rle
from pipeline.taxonomy import Category, Taxonomy, load_taxonomy
from pipeline.training.targets import class_index_map, instance_masks, output_labels, torchvision_target

LAW = settings(deadline=None, max_examples=40)


def taxonomy(ids: tuple[int, ...], void_ids: tuple[int, ...] = ()) -> Taxonomy:
    categories = tuple(Category(number, f"class {number}", "thing", (0, 0, 0)) for number in ids)
    return Taxonomy("test", "here", categories, void_ids)


@LAW
@given(st.data())
def test_indices_are_places_in_the_taxonomy(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 65_000), min_size=1, max_size=20, unique=True))
    space = taxonomy(tuple(ids))
    label_HW = data.draw(arrays.arrays(np.uint16, (3, 4), elements=st.sampled_from([*ids, space.void_id])))
    index_HW = class_index_map(label_HW, space)
    void_HW = label_HW == space.void_id
    assert index_HW.dtype == (np.uint8 if max(ids) < 255 else np.int32)
    np.testing.assert_array_equal(index_HW == space.void_id, void_HW)
    np.testing.assert_array_equal(np.array(ids)[index_HW[~void_HW]], label_HW[~void_HW])


def test_a_data_sets_own_void_is_void() -> None:
    space = load_taxonomy("camvid11")
    assert class_index_map(np.array([[0, 10, 11, 255]], np.uint8), space).tolist() == [[0, 10, 255, 255]]


@pytest.mark.parametrize(("dtype", "value"), [(np.uint8, 9), (np.uint16, 300), (np.int64, -1), (np.int32, 70_000)])
def test_ids_outside_the_taxonomy_are_refused(dtype: Any, value: int) -> None:
    space = taxonomy((1, 4))
    with pytest.raises(TargetMismatchError, match=rf"expected ids of test.*got .*\b{abs(value)}\b"):
        class_index_map(np.array([[1, value]], dtype), space)


def test_ids_outside_the_taxonomy_may_be_void() -> None:
    assert class_index_map(np.array([[1, 4, 9]], np.uint8), taxonomy((1, 4)), unknown_is_void=True).tolist() == [
        [0, 1, 255]
    ]


@pytest.fixture(scope="module")
def coco(shared_data: Path) -> COCO:
    return COCO(shared_data / "coco128" / "instances.json")


def test_real_annotations_are_the_masks_that_pycocotools_draws(coco: COCO) -> None:
    crowds, distances = 0, []
    space = load_taxonomy("coco80")
    for image in coco.dataset["images"]:
        annotations = coco.imgToAnns[image["id"]]
        found = instance_masks(annotations, height=image["height"], width=image["width"], taxonomy=space)
        crowds += found.crowds
        single = [item for item in annotations if not item["iscrowd"] and coco.annToMask(item).any()]
        assert found.labels_N.tolist() == [item["category_id"] for item in single]
        assert found.empty == sum(not coco.annToMask(item).any() for item in annotations if not item["iscrowd"])
        target = torchvision_target(found.masks_NHW, found.labels_N)
        assert target["masks"].shape == (len(single), image["height"], image["width"])
        for mask_HW, box_4, item in zip(target["masks"].numpy(), target["boxes"].numpy(), single, strict=True):
            np.testing.assert_array_equal(mask_HW, coco.annToMask(item))
            x, y, width, height = item["bbox"]
            distances.append(np.abs(box_4 - [x, y, x + width, y + height]).max())
    assert (crowds, len(distances)) == (10, 929)
    assert np.median(distances) < 0.5
    assert np.quantile(distances, 0.9) < 1
    assert max(distances) < 5


def annotation(segmentation: Any, **fields: Any) -> dict[str, Any]:
    return {"category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": segmentation} | fields


def rle(mask_HW: Any) -> dict[str, Any]:
    return {"size": [4, 5], "counts": encode_rle(np.asarray(mask_HW, np.uint8))}


FULL = np.ones((4, 5), np.uint8)


def test_what_is_no_instance_is_left_out_and_counted() -> None:
    annotations = [
        annotation(rle(FULL)),
        annotation(rle(FULL), iscrowd=1),
        annotation([]),
        {"category_id": 1, "bbox": [0, 0, 1, 1]},
        annotation(rle(0 * FULL)),
        annotation([[1.0, 1.0, 1.2, 1.0, 1.2, 1.2]], category_id=2),
        annotation({"size": [4, 5], "counts": [0, 4, 16]}, category_id=2),
    ]
    found = instance_masks(annotations, height=4, width=5, taxonomy=taxonomy((1, 2)))
    assert (found.crowds, found.maskless, found.empty) == (1, 2, 2)
    assert found.labels_N.tolist() == [1, 2]
    assert found.masks_NHW.dtype == torch.uint8
    assert found.masks_NHW.sum((1, 2)).tolist() == [20, 4]
    assert torchvision_target(found.masks_NHW, found.labels_N)["boxes"].tolist() == [[0, 0, 5, 4], [0, 0, 1, 4]]


def test_no_instances_are_empty_arrays() -> None:
    found = instance_masks([], height=4, width=5, taxonomy=taxonomy((1,)))
    target = torchvision_target(found.masks_NHW, found.labels_N)
    assert {name: tuple(values.shape) for name, values in target.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, 4, 5),
    }
    assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (annotation(rle(FULL), category_id=7), "categories that test lacks: .7"),
        (annotation({"size": [5, 4], "counts": rle(FULL)["counts"]}), r"expected a mask of \[4, 5\], got \[5, 4\]"),
        (annotation({"size": [4, 5], "counts": rle(FULL)["counts"][:-1]}), "masks of 5x4|compresses them"),
        (annotation({"size": [4, 5], "counts": "05"}), "masks of 5x4"),
        (annotation({"size": [4, 5], "counts": [3, 4]}), "masks of 5x4"),
        (annotation([[0, 0, 1e7, 0, 1e7, 1e7]]), "outlines of at most"),
        (annotation([["a", "b", "c", "d", "e", "f"]]), "expected COCO masks"),
        (annotation("text"), "expected COCO masks"),
        (annotation({"counts": "05"}), "expected COCO masks"),
        ({"category_id": 1, "segmentation": rle(FULL)}, "expected COCO annotations: KeyError: 'bbox'"),
    ],
)
def test_what_is_no_annotation_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetMismatchError, match=message):
        instance_masks([bad], height=4, width=5, taxonomy=taxonomy((1, 2)))


def test_masks_that_would_not_fit_are_not_unpacked() -> None:
    with pytest.raises(TargetMismatchError, match="masks of at most 2147483648 pixels in all, got 300 of 4000x3000"):
        instance_masks([annotation(rle(FULL))] * 300, height=3000, width=4000, taxonomy=taxonomy((1, 2)))


def test_labels_are_what_the_model_gives() -> None:
    ids = torch.tensor([7, 3, 7])
    assert output_labels(ids, taxonomy((3, 5, 7)), background=False).tolist() == [2, 0, 2]
    assert output_labels(ids, taxonomy((3, 5, 7)), background=True).tolist() == [7, 3, 7]
    with pytest.raises(ConfigError, match="taxonomy test has a category 0"):
        output_labels(ids, taxonomy((0, 3, 7)), background=True)


def test_boxes_stand_for_masks_where_a_detector_learns() -> None:
    boxes = [{"category_id": 1, "bbox": [1, 0, 2, 3]}, annotation(rle(FULL))]
    found = instance_masks(boxes, height=4, width=5, taxonomy=taxonomy((1, 2)), boxes=True)
    assert found.maskless == 0
    assert torchvision_target(found.masks_NHW, found.labels_N)["boxes"].tolist() == [[1, 0, 3, 3], [0, 0, 5, 4]]
    assert instance_masks(boxes[:1], height=4, width=5, taxonomy=taxonomy((1, 2))).maskless == 1
    with pytest.raises(TargetMismatchError, match="expected a bbox of x, y, w and h, got None"):
        instance_masks([{"category_id": 1}], height=4, width=5, taxonomy=taxonomy((1, 2)), boxes=True)


@LAW
@given(arrays.arrays(np.bool_, st.tuples(st.integers(0, 3), st.integers(1, 7), st.integers(1, 7))))
def test_boxes_are_the_masks_extent(masks_NHW: Any) -> None:
    masks_NHW = masks_NHW[masks_NHW.any((1, 2))]
    target = torchvision_target(torch.from_numpy(masks_NHW), torch.zeros(len(masks_NHW), dtype=torch.int64))
    for mask_HW, box_4 in zip(masks_NHW, target["boxes"].tolist(), strict=True):
        rows, columns = np.nonzero(mask_HW)
        assert box_4 == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_a_mask_without_a_pixel_has_no_box() -> None:
    with pytest.raises(ValueError, match="at least one pixel each"):
        torchvision_target(torch.zeros(1, 4, 5, dtype=torch.uint8), torch.ones(1, dtype=torch.int64))


def test_real_label_maps(shared_data: Path) -> None:
    label_HW = np.asarray(Image.open(min((shared_data / "camvid" / "trainannot").iterdir())))
    index_HW = class_index_map(label_HW, load_taxonomy("camvid11"))
    np.testing.assert_array_equal(index_HW, np.where(label_HW == 11, 255, label_HW))
    assert (index_HW == 255).any()
