"""Predict on toy modules: batches, little memory, tiles, and errors that stay with their row."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_models import TINY
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError, ImageTooLargeError, PredictError, RowError
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.postprocess import POSTPROCESS
from pipeline.models.registry import MODELS
from pipeline.models.spec import ModelSpec, PostContext, Prediction, Preprocess, Task
from pipeline.models.zoo.hf_depth_shared import bicubic_depth
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import Prepared, prepare
from pipeline.taxonomy import load_taxonomy

CPU = torch.device("cpu")
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
CLASSES = 8


class Pointwise(nn.Module):
    """1x1 convolution; `watch` sees each input first and may raise."""

    def __init__(self, outputs: int = CLASSES, watch: Callable[[Tensor], None] = lambda _: None) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, outputs, 1)
        generator = torch.Generator().manual_seed(0)
        self.head.weight.data = torch.randn(self.head.weight.shape, generator=generator)
        self.head.bias.data = torch.randn(outputs, generator=generator) * 0.1
        self.watch = watch
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image_BCHW: Tensor) -> Tensor:
        self.shapes.append(tuple(image_BCHW.shape))
        self.watch(image_BCHW)
        return self.head(image_BCHW)


def predict(
    module: nn.Module,
    *,
    task: Task = "semantic",
    batch_pixels: int = 1_000_000,
    tile_pixels: int = 4_000_000,
    preprocess: Preprocess = Preprocess(pad_multiple=16, **UNIT),  # type: ignore[arg-type]  # noqa: B008
    **spec: Any,
) -> Predict:
    context = PostContext(taxonomy=load_taxonomy("scenes"))
    built = ModelSpec(
        name="toy", task=task, build=lambda _: module, preprocess=preprocess, taxonomy="scenes", license="none", **spec
    )
    model = LoadedModel(
        label="toy",
        version="0",
        spec=built,
        module=module.eval().requires_grad_(False),
        preprocess=preprocess,
        context=context,
        postprocess=built.postprocess or POSTPROCESS[task],
        autocast=None,
        channels_last=False,
        compile=False,
    )
    return Predict(model, device=CPU, batch_pixels=batch_pixels, tile_pixels=tile_pixels)


def images(*sizes: tuple[int, int]) -> list[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3)).astype(np.uint8) for height, width in sizes]


def prepared(worker: Predict, pictures: Sequence[npt.NDArray[np.uint8]]) -> list[Prepared]:
    return [prepare(picture, worker.model.preprocess) for picture in pictures]


def expected(module: Pointwise, image_HWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The labels without any of the machinery, in numpy."""
    weight, bias = module.head.weight.numpy()[:, :, 0, 0], module.head.bias.numpy()
    return np.asarray((image_HWC / 255.0 @ weight.T + bias).argmax(-1))


def agree(result: Prediction | RowError, label_HW: npt.NDArray[Any], share: float = 0.999) -> None:
    assert isinstance(result, Prediction), result
    assert result.label_HW is not None
    assert result.label_HW.shape == label_HW.shape
    assert (result.label_HW == label_HW).mean() >= share  # all but ties in the last bit of a float


SIZES = [(20, 30), (32, 32), (17, 31), (25, 18), (31, 17)]  # all padded to 32x32


def test_a_batch_gives_each_image_its_labels_in_order() -> None:
    module = Pointwise()
    worker = predict(module)
    pictures = images(*SIZES)
    results = worker(prepared(worker, pictures))
    assert module.shapes == [(5, 3, 32, 32)]
    for result, picture in zip(results, pictures, strict=True):
        agree(result, expected(module, picture))


def test_a_batch_is_its_images_one_by_one() -> None:
    worker = predict(Pointwise())
    batch = prepared(worker, images(*SIZES))
    for together, item in zip(worker(batch), batch, strict=True):
        (alone,) = worker([item])
        assert isinstance(together, Prediction)
        assert isinstance(alone, Prediction)
        np.testing.assert_array_equal(together.label_HW, alone.label_HW)
        assert dataclasses.astuple(together.quality) == pytest.approx(dataclasses.astuple(alone.quality), rel=1e-5)  # type: ignore[arg-type]


def test_the_module_sees_normalised_pixels_and_zeros_around_them() -> None:
    seen: list[Tensor] = []
    preprocess = Preprocess(pad_multiple=32)
    worker = predict(Pointwise(watch=lambda image: seen.append(image.clone())), preprocess=preprocess)
    (picture,) = images((20, 30))
    worker(prepared(worker, [picture]))
    (image_BCHW,) = seen
    wanted = (picture / 255.0 - preprocess.mean) / preprocess.std
    np.testing.assert_allclose(image_BCHW[0, :, :20, :30].permute(1, 2, 0), wanted, atol=1e-5)
    assert not image_BCHW[:, :, 20:].any()
    assert not image_BCHW[:, :, :, 30:].any()


@pytest.mark.parametrize(
    ("preprocess", "height", "width", "size", "padded"),
    [
        (Preprocess(), 100, 50, (100, 50), (128, 64)),
        (Preprocess(resize=25, pad_multiple=1), 100, 50, (50, 25), (50, 25)),
        (Preprocess(resize=200, max_size=300, pad_multiple=8), 100, 50, (300, 150), (304, 152)),
        (Preprocess(resize=520, max_size=2080), 1, 5000, (1, 2080), (32, 2080)),
        (Preprocess(max_size=10, pad_multiple=1), 5000, 1, (10, 1), (10, 1)),
    ],
)
def test_preparing(
    preprocess: Preprocess, height: int, width: int, size: tuple[int, int], padded: tuple[int, int]
) -> None:
    image_HWC = np.full((height, width, 3), 77, np.uint8)
    image_HWC.flags.writeable = False  # as Pillow gives it
    item = prepare(image_HWC, preprocess)
    assert item.image_CHW.shape == (3, *size)
    assert item.image_CHW.dtype == torch.uint8
    assert (item.image_CHW == 77).all()
    assert (item.frame.height, item.frame.width) == (height, width)
    assert (item.frame.prepared_height, item.frame.prepared_width) == size
    assert item.padded == padded


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 700)])
@pytest.mark.parametrize("resize", [None, 40])
def test_extreme_shapes(size: tuple[int, int], resize: int | None) -> None:
    module = Pointwise()
    worker = predict(module, preprocess=Preprocess(resize=resize, max_size=resize and 160, pad_multiple=16, **UNIT))  # type: ignore[arg-type]
    (picture,) = images(size)
    (result,) = worker(prepared(worker, [picture]))
    assert isinstance(result, Prediction)
    assert result.label_HW is not None
    assert result.label_HW.shape == size
    if resize is None:
        agree(result, expected(module, picture))


# --- out of memory


def out_of_memory_above(pixels: int, error: Exception | None = None) -> Callable[[Tensor], None]:
    def watch(image_BCHW: Tensor) -> None:
        if image_BCHW.shape[0] * image_BCHW.shape[2] * image_BCHW.shape[3] > pixels:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    return watch


ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("error", [None, ALLOCATOR, MemoryError()])
def test_a_batch_out_of_memory_is_halved_in_order(error: Exception | None) -> None:
    module = Pointwise(watch=out_of_memory_above(2 * 1024, error))
    worker = predict(module, batch_pixels=100_000)
    pictures = images(*SIZES)
    for result, picture in zip(worker(prepared(worker, pictures)), pictures, strict=True):
        agree(result, expected(module, picture))
    assert [shape[0] for shape in module.shapes] == [5, 2, 3, 1, 2]
    assert worker.batch_pixels == 3 * 1024 // 2
    assert worker.tile_pixels == 4_000_000


def test_batches_that_were_filled_before_do_not_shrink_the_budget_again() -> None:
    worker = predict(Pointwise(watch=out_of_memory_above(2 * 1024)), batch_pixels=4096)
    batch = prepared(worker, images(*[(32, 32)] * 4))
    for _ in range(3):
        assert all(isinstance(result, Prediction) for result in worker(batch))
        assert worker.batch_pixels == 2048


def test_one_image_out_of_memory_is_tiled() -> None:
    module = Pointwise(watch=out_of_memory_above(100_000))
    worker = predict(module)
    (picture,) = images((600, 700))
    (result,) = worker(prepared(worker, [picture]))
    agree(result, expected(module, picture))
    assert 65_536 <= worker.tile_pixels <= 200_000
    assert module.shapes[-1][2] * module.shapes[-1][3] <= 100_000
    # What comes next is tiled at once.
    module.shapes.clear()
    worker(prepared(worker, [picture]))
    assert all(height * width <= 100_000 for _, _, height, width in module.shapes)


def test_an_image_in_a_batch_out_of_memory_is_tiled_too() -> None:
    module = Pointwise(watch=out_of_memory_above(150_000))
    worker = predict(module)
    pictures = images((400, 600), (390, 599), (385, 593))
    for result, picture in zip(worker(prepared(worker, pictures)), pictures, strict=True):
        agree(result, expected(module, picture))


@pytest.mark.parametrize("size", [(600, 700), (100, 100), (1, 9000)])
def test_without_hope_the_image_is_too_large(size: tuple[int, int]) -> None:
    worker = predict(Pointwise(watch=out_of_memory_above(0)))
    (result,) = worker(prepared(worker, images(size)))
    assert isinstance(result, ImageTooLargeError)
    width, height = (-(-side // 16) * 16 for side in (size[1], size[0]))
    assert str(result) == f"out of memory on cpu for one input of {width}x{height} pixels"


def test_a_task_without_tiles_is_too_large_at_once() -> None:
    module = Pointwise(watch=out_of_memory_above(0))
    worker = predict(module, task="instance")
    assert isinstance(worker(prepared(worker, images((600, 700))))[0], ImageTooLargeError)
    assert len(module.shapes) == 1


def test_a_postprocess_of_its_own_is_not_tiled_away() -> None:
    def inverse(output: Tensor, frames: Any, context: Any) -> list[Prediction]:
        return [Prediction(depth_HW=1 / plane[0].numpy(), depth_kind="metric_m") for plane in output]

    worker = predict(Pointwise(1), task="depth", postprocess=inverse, tile_pixels=65_536)
    (result,) = worker(prepared(worker, images((320, 320))))
    assert isinstance(result, Prediction)
    assert len(worker._module.shapes) == 1


# --- tiles


@pytest.mark.parametrize("size", [(300, 500), (33, 4000), (4000, 33), (1, 9000), (257, 256)])
@pytest.mark.parametrize("task", ["semantic", "depth"])
def test_tiles_of_a_pointwise_model_are_the_whole(size: tuple[int, int], task: Task) -> None:
    module = Pointwise(CLASSES if task == "semantic" else 1)
    (picture,) = images(size)
    whole, tiled = predict(module, task=task), predict(module, task=task, tile_pixels=65_536)
    (one,) = whole(prepared(whole, [picture]))
    module.shapes.clear()
    (other,) = tiled(prepared(tiled, [picture]))
    assert len(module.shapes) > 1
    assert all(height * width <= 65_536 for _, _, height, width in module.shapes)
    assert isinstance(one, Prediction)
    assert isinstance(other, Prediction)
    if task == "depth":
        np.testing.assert_allclose(other.depth_HW, one.depth_HW, atol=1e-5)  # type: ignore[arg-type]
        return
    agree(other, one.label_HW)  # type: ignore[arg-type]
    assert dataclasses.astuple(other.quality) == pytest.approx(dataclasses.astuple(one.quality), abs=0.02)  # type: ignore[arg-type]


def test_tiles_reach_the_decoded_size() -> None:
    module = Pointwise()
    preprocess = Preprocess(resize=300, pad_multiple=16, **UNIT)  # type: ignore[arg-type]
    picture = np.repeat(np.repeat(images((6, 8))[0], 100, axis=0), 100, axis=1)  # blocks: resizing moves no label
    worker = predict(module, preprocess=preprocess, tile_pixels=65_536)
    (result,) = worker(prepared(worker, [picture]))
    assert len(module.shapes) > 1
    agree(result, expected(module, picture), share=0.97)


class Coarse(Pointwise):
    """Answers at a quarter of its input's size, as many transformers do."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return functional.avg_pool2d(super().forward(image_BCHW), 4)


@pytest.mark.parametrize("tile_pixels", [4_000_000, 65_536])
def test_models_that_answer_at_a_fraction_are_upsampled(tile_pixels: int) -> None:
    module = Coarse()
    picture = np.repeat(np.repeat(images((10, 17))[0], 30, axis=0), 30, axis=1)[:290, :500]
    worker = predict(module, tile_pixels=tile_pixels)
    (result,) = worker(prepared(worker, [picture]))
    agree(result, expected(module, picture), share=0.8)
    # In the middle of each block nothing is blended: there the labels must be right, at the right place.
    centres = np.ix_(np.arange(15, 290, 30), np.arange(15, 480, 30))
    assert isinstance(result, Prediction)
    np.testing.assert_array_equal(result.label_HW[centres], expected(module, picture)[centres])  # type: ignore[index]


# --- errors


def raises_on_bright(image_BCHW: Tensor) -> None:
    if (image_BCHW == 1).flatten(1).all(1).any():
        raise ValueError("too bright\nby far")


def test_an_image_that_makes_the_module_raise_fails_alone() -> None:
    module = Pointwise(watch=raises_on_bright)
    worker = predict(module)
    pictures = images(*[(32, 32)] * 5)
    pictures[2][:] = 255
    results = worker(prepared(worker, pictures))
    assert isinstance(results[2], PredictError)
    assert str(results[2]) == "ValueError: too bright by far"
    for index in (0, 1, 3, 4):
        agree(results[index], expected(module, pictures[index]))


class NotFinite(Pointwise):
    """Gives `value` for all-white images."""

    def __init__(self, outputs: int, value: float) -> None:
        super().__init__(outputs)
        self.value = value

    def forward(self, image_BCHW: Tensor) -> Tensor:
        bright = (image_BCHW == 1).flatten(1).all(1)
        return torch.where(bright[:, None, None, None], self.value, super().forward(image_BCHW))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("task", ["semantic", "depth"])
@pytest.mark.parametrize("size", [(32, 32), (320, 320)])
def test_values_that_are_not_finite_fail_their_row(value: float, task: Task, size: tuple[int, int]) -> None:
    worker = predict(NotFinite(CLASSES if task == "semantic" else 1, value), task=task, tile_pixels=65_536)
    pictures = images(*[size] * 3)
    pictures[1][:] = 255
    batches = [prepared(worker, pictures)] if size == (32, 32) else [[item] for item in prepared(worker, pictures)]
    good, bad, last = (result for batch in batches for result in worker(batch))
    assert isinstance(good, Prediction)
    assert isinstance(last, Prediction)
    assert isinstance(bad, PredictError)
    assert "finite" in str(bad)


def test_a_module_that_changes_the_number_of_classes_stops_the_run() -> None:
    worker = predict(Pointwise(5))
    for act in (worker.check, lambda: worker(prepared(worker, images((32, 32), (32, 32))))):
        with pytest.raises(ConfigError, match="model 'toy' gives 5 classes, taxonomy 'scenes' has 8"):
            act()


class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, image_BCHW: Tensor) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.mark.parametrize("value", [None, [1], torch.zeros(1, 8), RuntimeError("no\nkernel"), KeyError("x")])
def test_check_says_what_fails(value: Any) -> None:
    with pytest.raises(ConfigError, match="model 'toy' fails on a 64x64 image: ") as caught:
        predict(Returns(value)).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["semantic", "depth"])
def test_check_passes_a_model_that_is_right(task: Task) -> None:
    predict(Pointwise(CLASSES if task == "semantic" else 1), task=task).check()


# --- tiles of depth


class OfATile(Pointwise):
    """The red channel as disparity, of another scale and shift in every call, as models of relative depth see parts of
    an image; at half of the input's resolution."""

    def __init__(self, changes: float = 1.0, watch: Callable[[Tensor], None] = lambda _: None) -> None:
        super().__init__(1, watch)
        self.changes = changes

    def forward(self, image_BCHW: Tensor) -> Tensor:
        calls = len(self.shapes)
        super().forward(image_BCHW)
        # The first call, of the whole image, is as it is.
        scale, shift = 1 + self.changes * (calls * 7 % 5), self.changes * 0.3 * (calls * 3 % 4)
        half_B1HW = functional.avg_pool2d(image_BCHW[:, :1], 2)
        return functional.interpolate(half_B1HW, scale_factor=2, mode="bilinear")[:, 0] * scale + shift


def slope(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Hills of half of the image's size on a slope: smooth, so that a small copy shows the same."""
    rows, columns = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    values = 90 + 60 * (rows + columns) + 40 * np.sin(2 * np.pi * columns) * np.sin(2 * np.pi * rows)
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=-1)


def fitted_worker(module: nn.Module, **options: Any) -> Predict:
    return predict(module, task="depth", postprocess=bicubic_depth, fits_tiles=True, **options)


def depth_of(worker: Predict, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    (result,) = worker(prepared(worker, [picture]))
    assert isinstance(result, Prediction), result
    assert result.depth_HW is not None
    assert result.depth_HW.shape == picture.shape[:2]
    return result.depth_HW


def steps(depth_HW: npt.NDArray[np.float32]) -> float:
    """The largest difference between neighbouring pixels."""
    return float(max(np.abs(np.diff(depth_HW, axis=axis)).max() for axis in (0, 1)))


@pytest.mark.parametrize("size", [(704, 896), (208, 2000), (912, 304)])
def test_depths_of_tiles_have_one_scale_and_no_seams(size: tuple[int, int]) -> None:
    picture = slope(*size)
    whole = depth_of(fitted_worker(OfATile()), picture)
    module = OfATile()
    tiled = depth_of(fitted_worker(module, tile_pixels=65_536), picture)
    assert len(module.shapes) > 4
    assert all(height * width <= 65_536 for _, _, height, width in module.shapes)
    # 1 / 255 is a step of the image.
    np.testing.assert_allclose(tiled, whole, atol=1.5 / 255)
    assert steps(tiled) < steps(whole) + 0.5 / 255
    # What it would be without: a dense model's tiles are blended as they are.
    seams = depth_of(predict(OfATile(), task="depth", tile_pixels=65_536), picture)
    assert np.abs(seams - whole).max() > 100 / 255
    assert steps(seams) > 2 * steps(tiled)


def test_a_model_that_says_of_a_tile_what_it_says_of_the_whole_is_left_alone() -> None:
    picture = (slope(304, 704) / 2 + images((304, 704))[0] / 4).astype(np.uint8)
    whole = depth_of(fitted_worker(OfATile(0)), picture)
    tiled = depth_of(fitted_worker(OfATile(0), tile_pixels=65_536), picture)
    # Of its noise the small copy shows little, yet nothing is made flatter.
    assert np.polyfit(tiled.ravel(), whole.ravel(), 1)[0] == pytest.approx(1, abs=0.03)
    np.testing.assert_allclose(tiled, whole, atol=0.02)


def test_a_depth_that_is_too_large_alone_is_tiled() -> None:
    module = OfATile(watch=out_of_memory_above(100_000))
    worker = fitted_worker(module)
    picture = slope(512, 704)
    depth_HW = depth_of(worker, picture)
    # In the scale of the first call that had room.
    scale, shift = np.polyfit(depth_HW.ravel(), picture[..., 0].ravel() / 255, 1)
    np.testing.assert_allclose(depth_HW * scale + shift, picture[..., 0] / 255, atol=0.02)
    assert module.shapes[-1][2] * module.shapes[-1][3] <= 100_000


def test_a_flat_tile_takes_the_wholes_depth() -> None:
    picture = slope(400, 704)
    picture[:, 350:] = 120
    tiled = depth_of(fitted_worker(OfATile(), tile_pixels=65_536), picture)
    np.testing.assert_allclose(tiled[20:-20, 450:-20], 120 / 255, atol=2 / 255)


def test_tiles_of_depth_reach_the_decoded_size() -> None:
    preprocess = Preprocess(resize=300, pad_multiple=16, **UNIT)  # type: ignore[arg-type]
    picture = slope(600, 900)
    depth_HW = depth_of(fitted_worker(OfATile(), preprocess=preprocess, tile_pixels=65_536), picture)
    np.testing.assert_allclose(depth_HW, picture[..., 0] / 255, atol=3 / 255)


@pytest.mark.parametrize("name", ["dpt_depth", "midas_hybrid", "depth_anything_v2", "depth_anything_v2_metric"])
def test_transformers_models_of_depth_are_tiled(name: str) -> None:
    pytest.importorskip("transformers", reason="extra hf")
    options = {**TINY[name], "resize": 300}
    model = load_model(ModelConfig(name=name, options=options), seed=0, tile_pixels=65_536)
    assert model.version != load_model(ModelConfig(name=name, options=options), seed=0, tile_pixels=70_000).version
    picture = slope(300, 420)
    worker = Predict(model, device=CPU, batch_pixels=1, tile_pixels=65_536)
    shapes: list[tuple[int, ...]] = []
    forward = model.spec.forward
    watched = dataclasses.replace(
        model.spec, forward=lambda module, image, frames: shapes.append(image.shape) or forward(module, image, frames)
    )
    worker.model = dataclasses.replace(model, spec=watched)
    depth_HW = depth_of(worker, picture)
    assert len(shapes) > 2
    assert all(shape[2] * shape[3] <= 65_536 for shape in shapes)
    assert np.isfinite(depth_HW).all()
    assert depth_HW.min() >= 0
    assert MODELS["zoedepth"].tiled is MODELS["depth_pro"].tiled is False
