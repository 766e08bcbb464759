"""From outputs to labels: against independent computations, and blind to whatever stands in the padding."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.models.postprocess import POSTPROCESS, dense_output, semantic_from_logits
from pipeline.models.spec import Frame, PostContext
from pipeline.taxonomy import Category, Taxonomy, load_taxonomy

VOC = PostContext(taxonomy=load_taxonomy("voc21"))
SPARSE = Taxonomy("sparse", "here", tuple(Category(i, str(i), "stuff", (0, 0, 0)) for i in (7, 3, 200)))
WIDE = Taxonomy("wide", "here", tuple(Category(i, str(i), "stuff", (0, 0, 0)) for i in range(300)))
semantic, instance, depth = (POSTPROCESS[task] for task in ("semantic", "instance", "depth"))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bilinear(plane_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with half-pixel centres and clamped borders, in numpy float64."""
    plane_HW = plane_HW.astype(np.float64)

    def weights(before: int, after: int) -> np.ndarray:
        matrix = np.zeros((after, before))
        for index in range(after):
            place = max((index + 0.5) * before / after - 0.5, 0)
            low = min(int(place), before - 1)
            high = min(low + 1, before - 1)
            matrix[index, low] += 1 - (place - low)
            matrix[index, high] += place - low
        return matrix

    return weights(plane_HW.shape[0], height) @ plane_HW @ weights(plane_HW.shape[1], width).T


SIDE = st.integers(1, 12)


@given(SIDE, SIDE, SIDE, SIDE)
@settings(deadline=None, max_examples=50)
def test_semantic_is_the_argmax_of_resized_logits(height: int, width: int, rows: int, columns: int) -> None:
    logits_BKHW = noise(1, 21, rows, columns)
    (prediction,) = semantic(logits_BKHW, [Frame(height, width, rows, columns)], VOC)
    resized_KHW = np.stack([bilinear(plane.numpy(), height, width) for plane in logits_BKHW[0]])
    assert prediction.label_HW is not None
    assert prediction.label_HW.dtype == np.uint8
    assert prediction.label_HW.shape == (height, width)
    chosen = np.take_along_axis(resized_KHW, prediction.label_HW[None].astype(np.int64), axis=0)[0]
    np.testing.assert_allclose(chosen, resized_KHW.max(0), atol=1e-4)
    assert prediction.instances is None
    assert prediction.depth_HW is None


def test_semantic_without_resizing_is_the_argmax() -> None:
    logits_BKHW = noise(3, 21, 8, 9)
    for prediction, logits_KHW in zip(
        semantic({"out": logits_BKHW}, [Frame(8, 9, 8, 9)] * 3, VOC), logits_BKHW, strict=True
    ):
        np.testing.assert_array_equal(prediction.label_HW, logits_KHW.numpy().argmax(0))


@pytest.mark.parametrize("task", ["semantic", "depth"])
def test_padding_has_no_influence(task: str) -> None:
    frames = [Frame(10, 14, 5, 7), Frame(3, 3, 6, 2)]
    shape = (2, 21 if task == "semantic" else 1, 8, 16)
    results = []
    for seed in (1, 2):
        output = noise(*shape, seed=seed) * 100
        for index, frame in enumerate(frames):
            output[index, :, : frame.prepared_height, : frame.prepared_width] = noise(
                shape[1], frame.prepared_height, frame.prepared_width
            )
        results.append(POSTPROCESS[task](output, frames, VOC))  # type: ignore[index]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one.label_HW, other.label_HW)
        np.testing.assert_array_equal(one.depth_HW, other.depth_HW)
        assert one.quality == other.quality


def test_a_batch_is_its_images() -> None:
    logits_BKHW = noise(3, 21, 8, 8)
    frames = [Frame(8, 8, 8, 8), Frame(16, 4, 7, 3), Frame(5, 5, 8, 1)]
    for index, prediction in enumerate(semantic(logits_BKHW, frames, VOC)):
        (alone,) = semantic(logits_BKHW[index : index + 1], frames[index : index + 1], VOC)
        np.testing.assert_array_equal(prediction.label_HW, alone.label_HW)
        assert prediction.quality == alone.quality


@pytest.mark.parametrize(("taxonomy", "dtype"), [(SPARSE, np.uint8), (WIDE, np.uint16)])
def test_labels_are_the_taxonomys_ids(taxonomy: Taxonomy, dtype: type) -> None:
    context = PostContext(taxonomy=taxonomy)
    logits_KHW = noise(len(taxonomy.ids), 6, 6)
    label_HW = semantic_from_logits(logits_KHW, Frame(6, 6, 6, 6), context).label_HW
    assert label_HW is not None
    assert label_HW.dtype == dtype
    np.testing.assert_array_equal(label_HW, np.array(taxonomy.ids)[logits_KHW.numpy().argmax(0)])


def test_ties_go_to_the_lowest_class() -> None:
    assert not semantic_from_logits(torch.zeros(21, 4, 4), Frame(4, 4, 4, 4), VOC).label_HW.any()  # type: ignore[union-attr]


def test_quality_by_hand() -> None:
    # Every fourth pixel in each direction of 5x5: (0, 0), (0, 4), (4, 0), (4, 4); the others must not count.
    logits_KHW = torch.full((2, 5, 5), math.nan)
    for (row, column), odds in {(0, 0): 1.0, (0, 4): 3.0, (4, 0): 9.0, (4, 4): 99.0}.items():
        logits_KHW[:, row, column] = torch.tensor([math.log(odds), 0.0])
    shares = np.array([0.5, 0.75, 0.9, 0.99])
    context = PostContext(taxonomy=SPARSE, low_confidence=0.8)
    quality = semantic_from_logits(logits_KHW, Frame(5, 5, 5, 5), context).quality
    assert quality is not None
    assert quality.mean_max_probability == pytest.approx(shares.mean(), rel=1e-6)
    entropy = -(shares * np.log(shares) + (1 - shares) * np.log(1 - shares))
    assert quality.mean_entropy == pytest.approx(entropy.mean(), rel=1e-6)
    assert quality.low_confidence_share == 0.5


def test_a_class_that_is_ruled_out_has_no_entropy() -> None:
    logits_KHW = torch.zeros(3, 4, 4)
    logits_KHW[2] = -math.inf
    quality = semantic_from_logits(logits_KHW, Frame(4, 4, 4, 4), PostContext(taxonomy=SPARSE)).quality
    assert quality is not None
    assert quality.mean_max_probability == pytest.approx(0.5)
    assert quality.mean_entropy == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "output", [None, [1], torch.zeros(2, 3), {"out": torch.zeros(3, 4, 4)}, np.zeros((1, 2, 3, 4))]
)
def test_what_is_no_dense_output(output: object) -> None:
    with pytest.raises(TypeError, match="expected a tensor of B, K, H, W, got"):
        dense_output(output)


# --- instances


def detection(scores: list[float]) -> dict[str, Tensor]:
    count = len(scores)
    return {
        "boxes": torch.arange(4 * count, dtype=torch.float32).view(count, 4),
        "scores": torch.tensor(scores),
        "labels": torch.arange(count) + 1,
        "masks": noise(count, 1, 28, 28).sigmoid(),
    }


def test_instances_are_the_best_above_the_threshold_by_score() -> None:
    context = PostContext(taxonomy=VOC.taxonomy, score_threshold=0.5, max_segments=3)
    output = [detection([0.2, 0.9, 0.5, 0.7, 0.9, math.nan]), detection([0.1]), detection([])]
    first, second, third = (p.instances for p in instance(output, [Frame(8, 8, 8, 8)] * 3, context))
    assert first is not None
    np.testing.assert_allclose(first.scores_N, [0.9, 0.9, 0.7])
    assert first.category_ids_N.tolist() == [2, 5, 4]
    assert first.category_ids_N.dtype == np.int64
    np.testing.assert_array_equal(first.masks_NMM, output[0]["masks"][[1, 4, 3], 0])
    for empty in (second, third):
        assert empty is not None
        assert (len(empty.scores_N), empty.boxes_N4.shape, empty.masks_NMM.shape) == (0, (0, 4), (0, 28, 28))


def test_boxes_reach_the_decoded_size() -> None:
    output = [{**detection([0.9]), "boxes": torch.tensor([[1.0, 2.0, 10.0, 20.0]])}]
    (prediction,) = instance(output, [Frame(height=300, width=50, prepared_height=100, prepared_width=25)], VOC)
    assert prediction.instances is not None
    assert prediction.instances.boxes_N4.tolist() == [[2, 6, 20, 60]]
    assert prediction.instances.boxes_N4.dtype == np.float32


# --- depth


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 8, 8)])
def test_depth_is_resized_bilinearly(shape: tuple[int, ...]) -> None:
    values = noise(*shape)
    context = PostContext(taxonomy=VOC.taxonomy, depth_kind="relative")
    (prediction,) = depth(values, [Frame(11, 13, 5, 7)], context)
    assert prediction.depth_HW is not None
    assert prediction.depth_HW.dtype == np.float32
    expected_HW = bilinear(values.view(8, 8)[:5, :7].numpy(), 11, 13)
    np.testing.assert_allclose(prediction.depth_HW, expected_HW, atol=1e-5)
    assert prediction.depth_kind == "relative"
    assert prediction.quality is None


def test_depth_at_its_size_is_left_as_it_is() -> None:
    values = noise(2, 1, 8, 8)
    for prediction, plane in zip(depth({"out": values}, [Frame(8, 8, 8, 8)] * 2, VOC), values, strict=True):
        np.testing.assert_array_equal(prediction.depth_HW, plane[0].numpy())
