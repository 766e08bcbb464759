"""Stages after a semantic model: small maps by hand, laws, and the way through Predict, Labeller and Validator."""

import dataclasses
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import TypeAdapter
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor, nn

from pipeline.config import ModelConfig, OutputConfig, RefineStage, Resources, ScenesSource, SuperpixelsStage
from pipeline.config_train import TargetConfig, ValidationConfig
from pipeline.errors import ConfigError, ImageTooLargeError
from pipeline.masks import decode_label_map
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.postprocess import POSTPROCESS
from pipeline.models.spec import Frame, ModelSpec, PostContext, Prediction, Preprocess
from pipeline.sources.base import UnitEnd
from pipeline.sources.registry import open_source
from pipeline.stages.decode import Decoded
from pipeline.stages.label import Labeller
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import Prepared, prepare
from pipeline.stages.refine import refine
from pipeline.stages.regions import dissolve_small_regions
from pipeline.stages.superpixels import find_superpixels, mean_probabilities, vote_labels, with_superpixels
from pipeline.stages.transfer import pack_windows, unpack_window
from pipeline.stages.work import LabelPlan, WorkItem
from pipeline.taxonomy import load_taxonomy
from pipeline.training.plan import plan_source
from pipeline.training.validate import Scores, Validator
from pipeline.training.workers import Workers

CPU = torch.device("cpu")
Maps = npt.NDArray[np.int64]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def stages(*trees: dict[str, Any]) -> tuple[RefineStage, ...]:
    return TypeAdapter(tuple[RefineStage, ...]).validate_python(trees)


# --- small regions


def grid(text: str) -> Maps:
    return np.array([[int(digit) for digit in row] for row in text.split()])


BY_HAND = [
    # A pixel inside of another class.
    ("0000 0100 0000", 2, 8, "0000 0000 0000"),
    # Between two: equal borders without the corners, five pairs of pixels to three with them.
    ("0001 0021 0111", 2, 4, "0001 0001 0111"),
    ("0001 0021 0111", 2, 8, "0001 0011 0111"),
    # Equal borders: the lowest label.
    ("11222 11322 11222", 2, 4, "11222 11222 11222"),
    ("113 113", 3, 4, "111 111"),
    # Of equal areas the lowest label goes first: 0 becomes 3, then 1 becomes 2.
    ("0312", 2, 4, "3322"),
    # Exactly min_area stays.
    ("0000 0110 0000", 2, 8, "0000 0110 0000"),
    # A diagonal is one region of three, or three regions of one.
    ("10000 01000 00100", 3, 8, "10000 01000 00100"),
    ("10000 01000 00100", 3, 4, "00000 00000 00000"),
    # What a region joins counts as one: the 2s are five together with the pixel that was a 3.
    ("00000 02320 00000", 3, 4, "00000 00000 00000"),
    ("525 525 535 525 525", 3, 4, "525 525 525 525 525"),
    # The map of one region stays, whatever its size.
    ("00 00", 100, 8, "00 00"),
    ("7", 2, 8, "7"),
    # Both are too small: the smaller goes first, and takes the other's label.
    ("112", 100, 8, "111"),
]


@pytest.mark.parametrize(("given_map", "min_area", "connectivity", "wanted"), BY_HAND)
def test_small_regions_by_hand(given_map: str, min_area: int, connectivity: int, wanted: str) -> None:
    found = dissolve_small_regions(grid(given_map), min_area=min_area, connectivity=connectivity)
    np.testing.assert_array_equal(found, grid(wanted))


def slowly(index_HW: Maps, min_area: int, connectivity: int) -> Maps:
    """The same rule, one region after the other, everything counted anew each time."""
    index_HW = index_HW.copy()
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)] + [(1, 1), (1, -1), (-1, 1), (-1, -1)] * (connectivity == 8)
    structure = ndimage.generate_binary_structure(2, connectivity // 4)
    height, width = index_HW.shape
    while True:
        regions = []
        for label in np.unique(index_HW):
            numbered_HW, count = ndimage.label(index_HW == label, structure)
            regions += [numbered_HW == number + 1 for number in range(count)]
        small = [region for region in regions if region.sum() < min_area]
        if len(regions) == 1 or not small:
            return index_HW
        smallest = min(region.sum() for region in small)
        if sum(region.sum() == smallest for region in small) > 1 and smallest > 1:
            raise ValueError("several smallest regions: their order is not part of the rule")
        region = next(region for region in small if region.sum() == smallest)
        around: Counter[int] = Counter()
        for y, x in zip(*np.nonzero(region), strict=True):
            for down, right in steps:
                inside = 0 <= y + down < height and 0 <= x + right < width
                if inside and not region[y + down, x + right]:
                    around[int(index_HW[y + down, x + right])] += 1
        index_HW[region] = min(around, key=lambda label: (-around[label], label))


@given(
    arrays(np.int64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.integers(0, 3)),
    st.integers(1, 6),
    st.sampled_from([4, 8]),
)
def test_no_small_region_is_left(index_HW: Maps, min_area: int, connectivity: int) -> None:
    found = dissolve_small_regions(index_HW, min_area=min_area, connectivity=connectivity)
    assert found.dtype == index_HW.dtype
    assert set(np.unique(found)) <= set(np.unique(index_HW))
    structure = ndimage.generate_binary_structure(2, connectivity // 4)
    areas = []
    for label in np.unique(found):
        numbered_HW, count = ndimage.label(found == label, structure)
        areas += np.bincount(numbered_HW.ravel(), minlength=count + 1)[1:].tolist()
    assert len(areas) == 1 or min(areas) >= min_area
    again = dissolve_small_regions(found, min_area=min_area, connectivity=connectivity)
    np.testing.assert_array_equal(again, found)


@given(arrays(np.int64, st.tuples(st.integers(2, 8), st.integers(2, 8)), elements=st.integers(0, 2)), st.integers(2, 9))
def test_the_fast_way_is_the_slow_one(index_HW: Maps, min_area: int) -> None:
    for connectivity in (4, 8):
        try:
            wanted = slowly(index_HW, min_area, connectivity)
        except ValueError:
            continue
        found = dissolve_small_regions(index_HW, min_area=min_area, connectivity=connectivity)
        np.testing.assert_array_equal(found, wanted)


# --- superpixels


def blocks() -> tuple[Tensor, Tensor]:
    """An image of two halves of different colours, and logits of three classes in which either half has a majority."""
    image = torch.zeros(3, 24, 32, dtype=torch.uint8)
    image[:, :, 16:] = 220
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 24, 32, generator=generator)
    logits[1, :, :16] += 0.7
    logits[2, :, 16:] += 0.7
    return logits, image


@pytest.mark.parametrize("method", ["slic", "felzenszwalb"])
@pytest.mark.parametrize("vote", ["labels", "probabilities"])
def test_each_superpixel_has_one_label_and_edges_are_the_image_s(method: str, vote: str) -> None:
    logits, image = blocks()
    stage = {"kind": "superpixels", "method": method, "vote": vote, "segments": 2, "min_size": 100, "sigma": 0.0}
    refined, index_HW = refine(logits, image, stages(stage))
    label_HW = refined.argmax(0) if index_HW is None else index_HW
    assert (index_HW is None) == (vote == "probabilities")
    assert (label_HW[:, :16] == 1).all()
    assert (label_HW[:, 16:] == 2).all()


def superpixel_map(seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 9, (13, 17)) * 2)  # with numbers that do not occur


@pytest.mark.parametrize("seed", range(3))
def test_votes_and_means_are_numpy_s(seed: int) -> None:
    superpixel_HW = superpixel_map(seed)
    logits = torch.randn(5, 13, 17, generator=torch.Generator().manual_seed(seed))
    index_HW = logits.argmax(0)
    probability = logits.softmax(0).numpy()
    voted, mean = vote_labels(index_HW, superpixel_HW, 5), mean_probabilities(logits, superpixel_HW)
    for number in np.unique(superpixel_HW):
        inside = superpixel_HW.numpy() == number
        counts = np.bincount(index_HW.numpy()[inside], minlength=5)
        assert set(voted.numpy()[inside]) == {int(counts.argmax())}
        for class_ in range(5):
            np.testing.assert_allclose(
                mean.exp().numpy()[class_][inside], probability[class_][inside].mean(), rtol=1e-5
            )


def test_equal_votes_go_to_the_lowest_class() -> None:
    voted = vote_labels(torch.tensor([[2, 1, 3, 3]]), torch.tensor([[0, 0, 1, 1]]), 4)
    assert voted.tolist() == [[1, 1, 3, 3]]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (5, 3)])
@pytest.mark.parametrize("method", ["slic", "felzenszwalb"])
def test_superpixels_of_small_shapes(size: tuple[int, int], method: Any) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = find_superpixels(image, SuperpixelsStage(kind="superpixels", method=method))
    assert found.shape == size
    assert int(found.min()) == 0


# --- in order, and through Predict


def test_stages_run_in_order() -> None:
    logits, image = blocks()
    crf, small = {"kind": "crf", "iterations": 2}, {"kind": "small_regions", "min_area": 20}
    vote = {"kind": "superpixels", "vote": "labels", "segments": 20}
    first, none = refine(logits, image, stages(crf))
    assert none is None
    refined, index_HW = refine(logits, image, stages(crf, vote, small))
    torch.testing.assert_close(refined, first)
    superpixel_HW = find_superpixels(image, stages(vote)[0])  # type: ignore[arg-type]
    voted = vote_labels(first.argmax(0), superpixel_HW, 3)
    np.testing.assert_array_equal(index_HW, dissolve_small_regions(voted.numpy(), min_area=20))
    nothing, index_HW = refine(logits, image, ())
    assert index_HW is None
    assert nothing is logits


class Pointwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 1, bias=False)
        self.head.weight.data = torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(0))

    def forward(self, image_BCHW: Tensor) -> Any:
        return self.head(image_BCHW)


def predict(*trees: dict[str, Any], preprocess: Preprocess | None = None, tile_pixels: int = 4_000_000) -> Predict:
    module = Pointwise()
    preprocess = preprocess or Preprocess(pad_multiple=16)
    model = LoadedModel(
        label="toy",
        version="0",
        spec=ModelSpec(
            name="toy",
            task="semantic",
            build=lambda _: module,
            preprocess=preprocess,
            taxonomy="scenes",
            license="none",
        ),
        module=module.eval().requires_grad_(False),
        preprocess=preprocess,
        context=PostContext(taxonomy=load_taxonomy("scenes")),
        postprocess=POSTPROCESS["semantic"],
        autocast=None,
        channels_last=False,
        compile=False,
        refine=stages(*trees),
    )
    return Predict(model, device=CPU, batch_pixels=1_000_000, tile_pixels=tile_pixels)


def images(*sizes: tuple[int, int]) -> list[npt.NDArray[np.uint8]]:
    """Blocks of 10 pixels of one colour, with a little noise."""
    rng = np.random.default_rng(0)
    pictures = []
    for height, width in sizes:
        coarse = rng.integers(0, 236, (height // 10 + 1, width // 10 + 1, 3))
        blocky = coarse.repeat(10, 0).repeat(10, 1)[:height, :width]
        pictures.append((blocky + rng.integers(0, 20, blocky.shape)).astype(np.uint8))
    return pictures


def run(worker: Predict, *pictures: npt.NDArray[np.uint8]) -> list[Prediction]:
    results = worker([prepare(picture, worker.model.preprocess) for picture in pictures])
    assert all(isinstance(result, Prediction) for result in results), results
    return results  # type: ignore[return-value]


CRF = {"kind": "crf", "iterations": 3}
VOTE = {"kind": "superpixels", "vote": "labels", "segments": 30}
SMALL = {"kind": "small_regions", "min_area": 30}


@pytest.mark.parametrize("trees", [[CRF], [VOTE], [SMALL], [CRF, SMALL]])
def test_a_batch_is_refined_image_by_image_at_the_prepared_size(trees: list[dict[str, Any]]) -> None:
    pictures = images((40, 60), (48, 64), (35, 50))
    plain, refined = run(predict(), *pictures), run(predict(*trees), *pictures)
    module, preprocess = Pointwise(), Preprocess(pad_multiple=16)
    for picture, before, after in zip(pictures, plain, refined, strict=True):
        image_CHW = torch.from_numpy(picture).permute(2, 0, 1)
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (preprocess.mean, preprocess.std))
        with torch.inference_mode():
            logits = module((image_CHW / 255 - mean)[None] / std)[0]
        wanted, index_HW = refine(logits, image_CHW, stages(*trees))
        label_HW = wanted.argmax(0) if index_HW is None else index_HW
        assert after.label_HW is not None
        assert before.label_HW is not None
        assert (after.label_HW == label_HW.numpy()).mean() > 0.995
        assert after.label_HW.dtype == before.label_HW.dtype
        assert (after.label_HW != before.label_HW).any()
        assert after.quality is not None
        assert after.quality.mean_max_probability == pytest.approx(
            wanted.softmax(0).amax(0)[::4, ::4].mean().item(), abs=1e-3
        )


def test_labels_reach_the_decoded_size_by_the_nearest_pixel() -> None:
    (picture,) = images((41, 60))
    small = Preprocess(resize=20, pad_multiple=16)
    (half,) = run(predict(SMALL, preprocess=small), picture)
    item = prepare(picture, small)
    logits = predict(preprocess=small)._values([item])[0]
    _, index_HW = refine(logits, item.image_CHW, stages(SMALL))
    assert index_HW is not None
    height, width = index_HW.shape
    rows = np.minimum((np.arange(41) + 0.5) * height / 41, height - 1).astype(int)
    columns = np.minimum((np.arange(60) + 0.5) * width / 60, width - 1).astype(int)
    np.testing.assert_array_equal(half.label_HW, index_HW.numpy()[np.ix_(rows, columns)])


@pytest.mark.parametrize("trees", [[CRF], [VOTE], [SMALL]])
def test_tiles_are_refined_as_one_whole(trees: list[dict[str, Any]]) -> None:
    (picture,) = images((260, 300))
    (whole,), (tiled,) = run(predict(*trees), picture), run(predict(*trees, tile_pixels=65_536), picture)
    assert (whole.label_HW == tiled.label_HW).mean() > 0.998  # type: ignore[union-attr]
    assert dataclasses.astuple(tiled.quality) == pytest.approx(dataclasses.astuple(whole.quality), abs=1e-3)  # type: ignore[arg-type]


def test_refining_out_of_memory_fails_its_row_and_shrinks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("pipeline.stages.predict.refine", without_memory)
    worker = predict(CRF)
    results = worker([prepare(picture, worker.model.preprocess) for picture in images((40, 60), (40, 60))])
    assert [str(result) for result in results] == ["out of memory refining an image of 60x40 pixels"] * 2
    assert all(isinstance(result, ImageTooLargeError) for result in results)
    assert (worker.batch_pixels, worker.tile_pixels) == (1_000_000, 4_000_000)


# --- configuration


def test_stages_are_part_of_the_version() -> None:
    def version(*trees: dict[str, Any]) -> str:
        config = ModelConfig.model_validate({"name": "unet_small", "options": {"width": 4}, "refine": trees})
        return load_model(config, seed=0, tile_pixels=1).version

    versions = [version(), version(CRF), version({"kind": "crf"}), version(SMALL), version(CRF, SMALL), version(VOTE)]
    assert len(set(versions)) == len(versions)
    assert version({"kind": "crf"}) == version({"kind": "crf", "iterations": 10})


@pytest.mark.parametrize("name", ["unet_small_depth", "maskrcnn_resnet50_fpn_v2"])
def test_other_tasks_are_refused(name: str) -> None:
    config = ModelConfig.model_validate({"name": name, "refine": [CRF]})
    with pytest.raises(
        ConfigError, match=f"refine works on the logits of semantic models, '{name}' is a model of task"
    ):
        load_model(config, seed=0, tile_pixels=1)


@pytest.mark.parametrize(("tree", "module"), [(VOTE, "skimage.segmentation"), (SMALL, "scipy.ndimage")])
def test_a_missing_extra_is_said_before_the_run(
    tree: dict[str, Any], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"maskmill\[classic\]"):
        predict(tree).check()


@pytest.mark.parametrize("tree", [CRF, VOTE, SMALL, {"kind": "superpixels", "method": "felzenszwalb"}])
def test_check_passes(tree: dict[str, Any]) -> None:
    predict(tree).check()


# --- through the worker and through training's validation

MODEL = {
    "weights": "bundled:unet_small_scenes",
    "refine": [CRF, {"kind": "small_regions", "min_area": 12}],
    "tta": {"scales": [0.75, 1], "flip": True},
}


def test_the_worker_refines_what_it_labels(tmp_path: Path) -> None:
    source = ScenesSource(format="scenes", count=4, width=64, height=48, targets=())
    plan = LabelPlan(
        source=source,
        models=(ModelConfig.model_validate(MODEL),),
        output=OutputConfig(uri=str(tmp_path)),
        resources=Resources(torch_threads=1, decode_threads=2),
        versions={},
        scorers=(None,),
        run_id="run-1",
        seed=0,
    )
    (unit,) = open_source(source).plan()
    labeller = Labeller(plan)
    windows = [*labeller.label(WorkItem(index=0, unit=unit, done=((),), attempts=({},)))]
    (file,) = (file for window in windows for file in window.files)
    rows = pq.read_table(tmp_path / file.path).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert {row["model_version"] for row in rows} == {labeller.models[0].version}
    taxonomy = load_taxonomy("scenes")
    for row in rows:
        label_HW = decode_label_map(row["semantic"]["data"], row["semantic"]["format"], width=64, height=48)
        np.testing.assert_array_equal(dissolve_small_regions(label_HW, min_area=12), label_HW)
        assert set(np.unique(label_HW)) <= set(taxonomy.ids)
        assert 0 < row["quality"]["mean_max_probability"] <= 1


SUPERPIXELS = [
    {"kind": "crf", "iterations": 2},
    {"kind": "superpixels", "segments": 40},
    {"kind": "superpixels", "method": "felzenszwalb", "vote": "labels", "min_size": 10},
]


def superpixel_plan(folder: Path) -> LabelPlan:
    model = {"weights": "bundled:unet_small_scenes", "refine": SUPERPIXELS, "tta": {"scales": [1, 1.5]}}
    return LabelPlan(
        source=ScenesSource(format="scenes", count=4, width=64, height=48, targets=()),
        models=(ModelConfig.model_validate(model),),
        output=OutputConfig(uri=str(folder)),
        resources=Resources(torch_threads=1, decode_threads=2),
        versions={},
        scorers=(None,),
        run_id="run-1",
        seed=0,
    )


def superpixel_rows(plan: LabelPlan, labeller: Labeller, stream: Any = None) -> list[dict[str, Any]]:
    (unit,) = open_source(plan.source).plan()
    item = WorkItem(index=0, unit=unit, done=((),), attempts=({},))
    windows = labeller.label(item) if stream is None else labeller.label_decoded(item, stream)
    files = [file for window in windows for file in window.files]
    rows = [row for file in files for row in pq.read_table(Path(plan.output.uri) / file.path).to_pylist()]
    return [{name: value for name, value in row.items() if name != "labeled_at"} for row in rows]


def decoded_of(plan: LabelPlan, labeller: Labeller) -> Iterator[Any]:
    (unit,) = open_source(plan.source).plan()
    return labeller._decoder.stream(unit, [()])


def test_superpixels_are_found_beside_the_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the threads that prepare images; rows are those of a worker whose predicting thread looks for them, bit by
    bit, and those of images that were prepared elsewhere."""
    threads: list[str] = []

    def watched(*given: Any) -> Tensor:
        threads.append(threading.current_thread().name.rsplit("_", 1)[0])
        return find_superpixels(*given)

    monkeypatch.setattr("pipeline.stages.superpixels.find_superpixels", watched)
    monkeypatch.setattr("pipeline.stages.refine.find_superpixels", watched)
    plan = superpixel_plan(tmp_path)
    labeller = Labeller(plan)
    beside = superpixel_rows(plan, labeller)
    assert threads == ["maskmill-cpu"] * 8
    threads.clear()
    (window, _), _ = pack_windows(decoded_of(plan, labeller), 9)
    assert len(threads) == 8
    elsewhere = superpixel_rows(plan, labeller, unpack_window(window, (labeller.models[0].preprocess,)))
    assert len(threads) == 8
    threads.clear()
    labeller._decoder.refine = ((),)
    before = superpixel_rows(plan, labeller)
    assert threads == ["maskmill-device"] * 8
    assert [row["status"] for row in beside] == ["ok"] * 4
    assert beside == before == elsewhere


def test_packed_superpixels_are_what_they_were() -> None:
    few = torch.arange(12, dtype=torch.int32).view(3, 4)
    many = few * 9000
    item = Prepared(torch.zeros(3, 3, 4, dtype=torch.uint8), Frame(3, 4, 3, 4), (3, 4), (few, many))
    decoded = Decoded(image_id="a", shard_id="s", position=0, width=4, height=3, prepared=(item, None))
    (data, _), _ = pack_windows(iter([decoded, UnitEnd(rows=1)]), 9)
    (again,) = unpack_window(data, (Preprocess(pad_multiple=1),) * 2)
    assert again.prepared[1] is None
    assert again.prepared[0] is not None
    found = again.prepared[0].superpixels
    assert [values.dtype for values in found] == [torch.int32] * 2
    assert all(torch.equal(one, other) for one, other in zip(found, (few, many), strict=True))
    assert decoded.size_bytes == again.size_bytes == 3 * 12 + 2 * 4 * 12


def test_superpixels_that_cannot_be_found_are_the_stages_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise ValueError("no superpixels today")

    monkeypatch.setattr("pipeline.stages.superpixels.find_superpixels", broken)
    monkeypatch.setattr("pipeline.stages.refine.find_superpixels", broken)
    worker = predict(VOTE)
    (picture,) = images((40, 60))
    item = with_superpixels(prepare(picture, worker.model.preprocess), worker.model.refine)
    assert item.superpixels == ()
    (result,) = worker([item])
    assert str(result) == "ValueError: no superpixels today"


def validate(config: dict[str, Any]) -> Scores:
    given = ValidationConfig.model_validate(
        {"source": {"format": "scenes", "count": 4, "width": 64, "height": 48}, "batch_images": 2}
    )
    model = load_model(ModelConfig.model_validate(config), seed=0, tile_pixels=2**22)
    plan = plan_source(open_source(given.source))
    validator = Validator(given, TargetConfig(), plan, model, device=CPU, threads=1)
    return validator.score(model.module, Workers())


def test_validation_scores_what_is_refined() -> None:
    plain, refined = validate({"weights": MODEL["weights"]}), validate(MODEL)
    for scores in (plain, refined):
        assert (scores.images, scores.failures) == (4, ())
    assert plain.confusion is not None
    assert refined.confusion is not None
    assert plain.confusion.to_row() != refined.confusion.to_row()
