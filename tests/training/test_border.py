"""U-Net's weights of an example: the paper's sum at the size that the model sees, from whatever target there is."""

import io
import json
import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from border_helpers import flood_fill, weight_formula
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from training_helpers import PREPROCESS

from pipeline.config import ScenesSource
from pipeline.config_train import TargetConfig
from pipeline.masks import encode_panoptic_png, encode_rle
from pipeline.sources.base import Sample
from pipeline.taxonomy import load_taxonomy
from pipeline.training.augment import AugmentOptions, augment, draw_change, make_example
from pipeline.training.batch import collate
from pipeline.training.border import BorderWeights
from pipeline.training.samples import Preparation
from pipeline.training.task_targets import TaskTargets

Array = np.ndarray[Any, Any]
SCENES = load_taxonomy("scenes")
ROAD, CAR, PERSON = 2, 5, 6
CLASS_WEIGHTS = (1.0, 1.0, 0.5, 1.0, 1.0, 3.0, 1.0, 1.0)
BORDER = BorderWeights(classes=frozenset({CAR}), class_weights=CLASS_WEIGHTS, void_id=255)


def street() -> tuple[Array, Array]:
    """Two cars 5 pixels apart on a road of 40x24, a person between the second and a third car, void at the left."""
    label_HW = np.full((24, 40), ROAD, np.uint8)
    cell_HW = np.zeros((24, 40), np.int32)
    for cell, columns in ((1, slice(4, 10)), (2, slice(15, 22)), (3, slice(30, 36))):
        label_HW[6:18, columns], cell_HW[6:18, columns] = CAR, cell
    label_HW[8:20, 24:28] = PERSON
    label_HW[:, :3] = 255
    return label_HW, cell_HW


def png(array: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(*kinds: str) -> Sample:
    label_HW, cell_HW = street()
    cells = [{"id": 10 * cell, "category_id": CAR} for cell in (1, 2, 3)]
    masks = [encode_rle(cell_HW == cell) for cell in (1, 2, 3)]
    targets = {
        "semantic": png(label_HW),
        "panoptic": encode_panoptic_png(np.where(label_HW == PERSON, 7, 10 * cell_HW)),
        "segments": json.dumps([*cells, {"id": 7, "category_id": PERSON}]).encode(),
        "instances": json.dumps(
            [
                {"category_id": CAR, "bbox": [0, 0, 1, 1], "segmentation": {"size": [24, 40], "counts": mask}}
                for mask in masks
            ]
        ).encode(),
    }
    image_HWC = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    return Sample(
        image_id="a", shard_id="s", position=0, image=png(image_HWC), targets={kind: targets[kind] for kind in kinds}
    )


def weights(sample: Sample, border: BorderWeights = BORDER, **options: Any) -> dict[str, Array]:
    """What a sample becomes, its maps as arrays."""
    source = ScenesSource(format="scenes", count=1)
    preparation = Preparation(
        targets=TaskTargets(TargetConfig(), source, "semantic", SCENES),
        options=AugmentOptions(**options),
        seed=0,
        max_pixels=10**6,
        border=border,
    )
    item = pickle.loads(pickle.dumps(preparation)).item(sample, 0)
    assert item.example is not None, item.failure
    assert set(item.example) == {"image", "semantic", "pixel_weight"}
    assert item.example["pixel_weight"].dtype == torch.float32
    return {name: values.as_subclass(torch.Tensor).numpy() for name, values in item.example.items()}


def summed(label_HW: Array, cell_HW: Array, border: BorderWeights = BORDER) -> Array:
    """The paper's formula, and nothing where the target is void."""
    void_HW = label_HW == 255
    class_weight_HW = np.array(border.class_weights)[np.where(void_HW, 0, label_HW)]
    weight_HW = weight_formula(cell_HW, class_weight_HW, w0=border.w0, sigma=border.sigma)
    return np.where(void_HW, 0, weight_HW)


KINDS = [("semantic",), ("semantic", "instances"), ("semantic", "panoptic", "segments"), ("panoptic", "segments")]


@pytest.mark.parametrize("kinds", KINDS[:3])
def test_a_gap_counts_as_the_formula_says(kinds: tuple[str, ...]) -> None:
    found = weights(encoded(*kinds))
    weight_HW, label_HW = found["pixel_weight"], found["semantic"]
    # In the middle of the gap, 3 pixels from either car: the class's weight and, added to it, the border's.
    assert weight_HW[12, 12] == pytest.approx(0.5 + 10 * math.exp(-((3 + 3) ** 2) / 50), rel=1e-6)
    assert weight_HW[12, 10] == pytest.approx(0.5 + 10 * math.exp(-((1 + 5) ** 2) / 50), rel=1e-6)
    # A person is no cell here, but stands between two.
    assert weight_HW[12, 26] == pytest.approx(1 + 10 * math.exp(-((5 + 4) ** 2) / 50), rel=1e-6)
    assert (weight_HW[label_HW == CAR] == 3).all()
    assert (weight_HW[:, :3] == 0).all()
    np.testing.assert_allclose(weight_HW, summed(*street()), rtol=1e-6, atol=1e-6)


def test_a_panoptic_target_alone_is_enough() -> None:
    """Its void is where no segment is: nothing is learned there, however near to two cars."""
    found = weights(encoded("panoptic", "segments"))
    cells_HW = street()[1]
    assert (found["pixel_weight"][(cells_HW == 0) & (found["semantic"] != PERSON)] == 0).all()
    assert found["pixel_weight"][12, 26] == pytest.approx(1 + 10 * math.exp(-((5 + 4) ** 2) / 50), rel=1e-6)


@pytest.mark.parametrize("kinds", KINDS[:3])
@pytest.mark.parametrize("options", [{"scale": (2.0, 2.0)}, {"scale": (0.5, 0.5), "flip": 1.0}, {"crop": (11, 23)}])
def test_weights_are_made_at_the_size_that_the_model_sees(kinds: tuple[str, ...], options: dict[str, Any]) -> None:
    """Distances are in its pixels."""
    label_HW, cell_HW = street()
    image_HWC = np.zeros((24, 40, 3), np.uint8)
    found = weights(encoded(*kinds), **options)
    plain = make_example(image_HWC, semantic_HW=label_HW, panoptic_HW=cell_HW)
    changed = augment(plain, AugmentOptions(**options), seed=0, epoch=0, image_id="a")
    np.testing.assert_array_equal(found["semantic"], changed["semantic"].numpy())
    expected_HW = summed(changed["semantic"].numpy(), changed["panoptic"].numpy())
    np.testing.assert_allclose(found["pixel_weight"], expected_HW, rtol=1e-6, atol=1e-6)
    assert found["pixel_weight"][found["semantic"] == ROAD].max() > 0.9


def test_an_object_that_the_crop_cuts_in_two_stays_one() -> None:
    """A car like a U, of which the crop shows two arms: no border runs between them."""
    label_HW = np.full((24, 40), ROAD, np.uint8)
    label_HW[:, 10:24] = CAR
    label_HW[:20, 14:20] = ROAD
    sample = replace(encoded("semantic"), targets={"semantic": png(label_HW)})
    found = weights(sample, crop=(4, 40))
    assert found["semantic"].tolist() == [label_HW[0].tolist()] * 4
    assert (found["pixel_weight"] == np.where(found["semantic"] == CAR, np.float32(3), np.float32(0.5))).all()


def test_a_mirrored_image_has_mirrored_weights() -> None:
    """As if they had been made before, as the paper makes them: an object's reflection is no second object."""
    options = {"crop": (40, 64), "pad": "mirror"}
    border = replace(BORDER, sigma=2.0)
    whole_HW = weights(encoded("semantic"), border)["pixel_weight"]
    found_HW = weights(encoded("semantic"), border, **options)["pixel_weight"]
    change = draw_change(AugmentOptions(**options), 24, 40, seed=0, epoch=0, image_id="a")
    around = [(-change.top, 16 + change.top), (-change.left, 24 + change.left)]
    expected_HW = np.pad(whole_HW, around, mode="reflect")
    # As far from the edge as objects beyond it could be felt: 10 exp(-12^2 / 8) < 1e-6.
    inner = slice(12, -12), slice(12, -12)
    np.testing.assert_allclose(found_HW[inner], expected_HW[inner], rtol=1e-5, atol=1e-6)
    assert min(min(sides) for sides in around) < 12 < max(max(sides) for sides in around)


@settings(deadline=None, max_examples=60)
@given(
    arrays.arrays(
        np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=14), elements=st.sampled_from([0, 1, 2, 255])
    ),
    st.sampled_from([(10.0, 5.0), (3.0, 1.0), (0.5, 12.0)]),
)
def test_it_is_the_papers_sum(label_HW: Array, parameters: tuple[float, float]) -> None:
    border = BorderWeights(
        classes=frozenset({1, 2}), class_weights=(0.25, 2.0, 7.0), void_id=255, w0=parameters[0], sigma=parameters[1]
    )
    cell_HW = flood_fill(label_HW, {1, 2})
    example = make_example(np.zeros((*label_HW.shape, 3), np.uint8), semantic_HW=label_HW, panoptic_HW=cell_HW)
    found = border.weighted(example)
    assert set(example) == {"image", "semantic", "panoptic"}
    np.testing.assert_allclose(found["pixel_weight"].numpy(), summed(label_HW, cell_HW, border), rtol=2e-6, atol=2e-7)


def test_classes_beyond_255() -> None:
    label_HW = np.array([[300, 0, 7, 65535]], np.uint16)
    border = BorderWeights(
        classes=frozenset({300, 7}), class_weights=tuple(float(index) for index in range(301)), void_id=65535
    )
    cell_HW = np.array([[1, 0, 2, 0]])
    example = make_example(np.zeros((1, 4, 3), np.uint8), semantic_HW=label_HW, panoptic_HW=cell_HW)
    expected = [[300, 10 * math.exp(-((1 + 1) ** 2) / 50), 7, 0]]
    np.testing.assert_allclose(border.weighted(example)["pixel_weight"].numpy(), expected, rtol=1e-6)


def test_padding_counts_for_nothing() -> None:
    small = make_example(np.zeros((5, 7, 3), np.uint8), semantic_HW=np.full((5, 7), ROAD, np.uint8))
    small["pixel_weight"] = torch.full((5, 7), 2.5)
    large = make_example(np.zeros((8, 4, 3), np.uint8), semantic_HW=np.full((8, 4), ROAD, np.uint8))
    large["pixel_weight"] = torch.full((8, 4), 1.5)
    found_BHW = collate([small, large], PREPROCESS, void_id=255).targets["pixel_weight"]
    assert found_BHW.dtype == torch.float32
    expected_BHW = torch.zeros(2, 8, 8)
    expected_BHW[0, :5, :7], expected_BHW[1, :, :4] = 2.5, 1.5
    assert torch.equal(found_BHW, expected_BHW)
