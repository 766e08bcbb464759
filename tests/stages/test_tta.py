"""Test-time augmentation against averages made by hand, and what it leaves as it was."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import functional as transforms

from pipeline.config import ModelConfig, TtaConfig
from pipeline.errors import ConfigError, ImageTooLargeError
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.postprocess import POSTPROCESS
from pipeline.models.spec import ModelSpec, PostContext, Postprocess, Prediction, Preprocess, Task
from pipeline.stages.augmented import augmented
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import Prepared, prepare
from pipeline.taxonomy import load_taxonomy

CPU = torch.device("cpu")
CLASSES = 8
PREPROCESS = Preprocess(pad_multiple=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Convolution(nn.Module):
    """A 3x3 convolution. mirrored: its kernel is, so that a mirrored image gives a mirrored output."""

    def __init__(
        self, outputs: int = CLASSES, *, mirrored: bool = False, watch: Callable[[Tensor], None] = lambda _: None
    ) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, outputs, 3, padding=1, bias=False)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.head.weight.shape, generator=generator)
        self.head.weight.data = weight + weight.flip(-1) if mirrored else weight
        self.watch = watch
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image_BCHW: Tensor) -> Any:
        self.shapes.append(tuple(image_BCHW.shape))
        self.watch(image_BCHW)
        return self.head(image_BCHW)


class Constant(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.arange(float(outputs)) + 1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.value[None, :, None, None].expand(len(image_BCHW), -1, *image_BCHW.shape[2:])


def predict(
    module: nn.Module,
    tta: dict[str, Any] | None,
    *,
    task: Task = "semantic",
    tile_pixels: int = 4_000_000,
    depth_kind: str = "metric_m",
    preprocess: Preprocess = PREPROCESS,
    postprocess: Postprocess | None = None,
) -> Predict:
    spec = ModelSpec(
        name="toy",
        task=task,
        build=lambda _: module,
        preprocess=preprocess,
        taxonomy="scenes",
        license="none",
        postprocess=postprocess,
    )
    model = LoadedModel(
        label="toy",
        version="0",
        spec=spec,
        module=module.eval().requires_grad_(False),
        preprocess=preprocess,
        context=PostContext(taxonomy=load_taxonomy("scenes"), depth_kind=depth_kind),
        postprocess=postprocess or POSTPROCESS[task],
        autocast=None,
        channels_last=False,
        compile=False,
        tta=None if tta is None else TtaConfig.model_validate(tta),
    )
    return Predict(model, device=CPU, batch_pixels=1_000_000, tile_pixels=tile_pixels)


def images(*sizes: tuple[int, int]) -> list[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3)).astype(np.uint8) for height, width in sizes]


def run(worker: Predict, *pictures: npt.NDArray[np.uint8]) -> list[Prediction]:
    results = worker([prepare(picture, worker.model.preprocess) for picture in pictures])
    assert all(isinstance(result, Prediction) for result in results), results
    return results  # type: ignore[return-value]


SIZES = [(20, 30), (32, 32), (17, 31)]  # all padded to 32x32


@pytest.mark.parametrize("task", ["semantic", "depth"])
@pytest.mark.parametrize("size", [(20, 30), (300, 320)])
@pytest.mark.parametrize("tta", [{"scales": [1]}, {"scales": [1], "flip": False, "window": None}])
def test_one_view_is_the_image_bit_for_bit(task: Task, size: tuple[int, int], tta: dict[str, Any]) -> None:
    module = Convolution(CLASSES if task == "semantic" else 1)
    pictures = images(size)
    (plain,) = run(predict(module, None, task=task, tile_pixels=65_536), *pictures)
    config = ModelConfig(name="unet_small" if task == "semantic" else "unet_small_depth", tta=tta)
    assert load_model(config, seed=0, tile_pixels=1).tta is None
    (other,) = run(predict(module, tta, task=task, tile_pixels=65_536), *pictures)
    if task == "depth":
        np.testing.assert_array_equal(other.depth_HW, plain.depth_HW)
    else:
        np.testing.assert_array_equal(other.label_HW, plain.label_HW)


def by_hand(module: Convolution, image_HWC: npt.NDArray[np.uint8], scales: list[float], flip: bool) -> npt.NDArray[Any]:
    """The mean probability over views, in numpy, each view resized and padded on its own."""
    height, width = image_HWC.shape[:2]
    total: Any = 0
    for scale in scales:
        size = (round(height * scale), round(width * scale))
        image_CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)
        scaled = transforms.resize_image(image_CHW, list(size), antialias=True) if scale != 1 else image_CHW
        for mirrored in (False, True)[: 1 + flip]:
            view = np.asarray(scaled)[:, :, ::-1] if mirrored else np.asarray(scaled)
            padded = np.zeros((1, 3, -(-size[0] // 16) * 16, -(-size[1] // 16) * 16), np.float32)
            padded[0, :, : size[0], : size[1]] = view / 255.0
            logits = module.head(torch.from_numpy(padded))[:, :, : size[0], : size[1]].numpy()
            logits = logits[..., ::-1].copy() if mirrored else logits
            whole = functional.interpolate(torch.from_numpy(logits), size=(height, width), mode="bilinear")[0].numpy()
            exponent = np.exp(whole.astype(np.float64))
            total = total + exponent / exponent.sum(0)
    return np.asarray(total / (len(scales) * (1 + flip)))


@pytest.mark.parametrize(
    ("scales", "flip"), [([0.75, 1, 1.25], True), ([1], True), ([0.5, 2], False), ([1.5], False), ([1, 0.75], True)]
)
def test_probabilities_are_averaged(scales: list[float], flip: bool) -> None:
    module = Convolution()
    worker = predict(module, {"scales": scales, "flip": flip})
    pictures = images(*SIZES)
    batch = [prepare(picture, PREPROCESS) for picture in pictures]
    with torch.inference_mode():
        values = worker._values(batch)
    for picture, values_KHW, result in zip(pictures, values, run(worker, *pictures), strict=True):
        wanted = by_hand(module, picture, scales, flip)
        np.testing.assert_allclose(values_KHW.softmax(0).numpy(), wanted, atol=2e-5)
        assert (result.label_HW == wanted.argmax(0)).mean() > 0.999
        assert result.quality is not None
        assert result.quality.mean_max_probability == pytest.approx(wanted.max(0)[::4, ::4].mean(), abs=1e-4)


def test_an_image_s_views_do_not_depend_on_the_batch() -> None:
    worker = predict(Convolution(), {"scales": [0.6, 1, 1.7], "flip": True})
    pictures = images(*SIZES, (25, 18))
    together = run(worker, *pictures)
    for result, picture in zip(together, pictures, strict=True):
        (alone,) = run(worker, picture)
        np.testing.assert_array_equal(result.label_HW, alone.label_HW)


def test_a_model_that_mirrors_is_the_same_with_and_without_flips() -> None:
    module = Convolution(mirrored=True)
    (picture,) = images((48, 64))
    (plain,) = run(predict(module, None), picture)
    (flipped,) = run(predict(module, {"flip": True}), picture)
    np.testing.assert_array_equal(flipped.label_HW, plain.label_HW)
    one_way = Convolution()
    (plain,), (flipped,) = run(predict(one_way, None), picture), run(predict(one_way, {"flip": True}), picture)
    assert (flipped.label_HW != plain.label_HW).mean() > 0.05  # type: ignore[union-attr]


@pytest.mark.parametrize("window", [None, {"size": 32, "overlap": 8}])
@pytest.mark.parametrize("task", ["semantic", "depth"])
def test_a_constant_stays(window: dict[str, int] | None, task: Task) -> None:
    tta = {"scales": [0.5, 1, 1.3], "flip": True, "window": window}
    results = run(predict(Constant(CLASSES if task == "semantic" else 1), tta, task=task), *images(*SIZES, (70, 90)))
    for result in results:
        if task == "depth":
            np.testing.assert_allclose(result.depth_HW, 1, atol=1e-6)  # type: ignore[arg-type]
            continue
        assert (result.label_HW == CLASSES - 1).all()
        probability = np.exp(np.arange(8.0)) / np.exp(np.arange(8.0)).sum()
        assert result.quality is not None
        assert result.quality.mean_max_probability == pytest.approx(probability[-1], abs=1e-5)
        assert result.quality.mean_entropy == pytest.approx(-(probability * np.log(probability)).sum(), abs=1e-5)


# --- depth


class Levels(nn.Module):
    """Depth that each view shows with a scale and shift of its own: by the number of calls before."""

    def __init__(self, changes: list[tuple[float, float]]) -> None:
        super().__init__()
        self.changes = changes
        self.calls = 0

    def forward(self, image_BCHW: Tensor) -> Tensor:
        scale, shift = self.changes[self.calls % len(self.changes)]
        self.calls += 1
        return image_BCHW[:, :1] * scale + shift


def test_metric_depths_are_averaged_as_they_are() -> None:
    (picture,) = images((32, 48))
    worker = predict(Levels([(1.0, 0.0), (2.0, 0.5)]), {"flip": True}, task="depth")
    (result,) = run(worker, picture)
    np.testing.assert_allclose(result.depth_HW, picture[..., 0] / 255 * 1.5 + 0.25, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["relative", "inverse_relative"])
def test_relative_depths_are_fitted_to_the_view_nearest_to_scale_one(kind: str) -> None:
    # The first call is the plain view, whatever the order of the scales.
    changes = [(1.0, 0.0), (3.0, -2.0), (0.2, 5.0), (10.0, 1.0)]
    worker = predict(Levels(changes), {"scales": [2, 1], "flip": True}, task="depth", depth_kind=kind)
    (result,) = run(worker, np.full((32, 48, 3), 100, np.uint8))
    np.testing.assert_allclose(result.depth_HW, 100 / 255, atol=1e-5)  # type: ignore[arg-type]
    smooth = np.broadcast_to(np.linspace(0, 255, 48).astype(np.uint8)[None, :, None], (32, 48, 3)).copy()
    (result,) = run(worker, smooth)
    np.testing.assert_allclose(result.depth_HW, smooth[..., 0] / 255, atol=0.02)  # type: ignore[arg-type]


def test_a_view_that_says_the_opposite_counts_with_its_mean_alone() -> None:
    (picture,) = images((32, 48))
    worker = predict(Levels([(1.0, 0.0), (-1.0, 0.0)]), {"flip": True}, task="depth", depth_kind="relative")
    (result,) = run(worker, picture)
    plain = picture[..., 0] / 255
    np.testing.assert_allclose(result.depth_HW, np.full_like(plain, plain.mean()), atol=1e-5)  # type: ignore[arg-type]


def nearest_row(output: Tensor, frames: Any, context: PostContext) -> list[Prediction]:
    """A postprocess of its own: metres at the decoded size, by the nearest pixel."""
    predictions = []
    for plane_1HW, frame in zip(output, frames, strict=True):
        cut_1HW = plane_1HW[:, : frame.prepared_height, : frame.prepared_width]
        size = (frame.height, frame.width)
        depth_HW = functional.interpolate(cut_1HW[None], size=size, mode="nearest-exact")[0, 0].numpy()
        predictions.append(Prediction(depth_HW=depth_HW, depth_kind=context.depth_kind))
    return predictions


@pytest.mark.parametrize("size", [(40, 50), (64, 48)])
def test_depths_of_a_postprocess_of_its_own_are_averaged_at_the_decoded_size(size: tuple[int, int]) -> None:
    module = Convolution(1)
    pictures = images(size, size)
    worker = predict(module, {"scales": [1, 0.5], "flip": True}, task="depth", postprocess=nearest_row)
    assert not worker.model.spec.dense
    for picture, result in zip(pictures, run(worker, *pictures), strict=True):
        total: Any = 0
        for resize in (None, min(size) // 2):
            preprocess = dataclasses.replace(PREPROCESS, resize=resize)
            plain = predict(module, None, task="depth", preprocess=preprocess, postprocess=nearest_row)
            for step in (1, -1):
                (view,) = run(plain, np.ascontiguousarray(picture[:, ::step]))
                assert view.depth_HW is not None
                total = total + view.depth_HW[:, ::step]
        # Mirrored before or after resizing differs by a level of 256 here and there.
        assert np.abs(result.depth_HW - total / 4).mean() < 1e-3
        assert np.abs(result.depth_HW - total / 4).max() < 0.05


# --- windows, tiles and memory


@pytest.mark.parametrize("size", [(100, 130), (40, 200), (33, 16), (1, 90)])
def test_windows_of_a_pointwise_model_are_the_whole(size: tuple[int, int]) -> None:
    module = Convolution()
    module.head.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    (picture,) = images(size)
    (plain,) = run(predict(module, None), picture)
    module.shapes.clear()
    (windowed,) = run(predict(module, {"window": {"size": 48, "overlap": 16}}), picture)
    assert all(height <= 48 and width <= 48 for _, _, height, width in module.shapes)
    assert len(module.shapes) == math.prod(1 if side <= 48 else 1 + -(-(side - 48) // 32) for side in size)
    assert (windowed.label_HW == plain.label_HW).mean() > 0.999  # type: ignore[union-attr]


def test_windows_of_images_of_one_size_go_together() -> None:
    module = Convolution()
    worker = predict(module, {"window": {"size": 32, "overlap": 8}})
    pictures = images((40, 32), (40, 32), (33, 32))
    together = run(worker, *pictures)
    assert sorted({shape[0] for shape in module.shapes}) == [1, 2]
    for result, picture in zip(together, pictures, strict=True):
        np.testing.assert_array_equal(result.label_HW, run(worker, picture)[0].label_HW)


def out_of_memory_above(pixels: int) -> Callable[[Tensor], None]:
    def watch(image_BCHW: Tensor) -> None:
        if image_BCHW.shape[0] * image_BCHW.shape[2] * image_BCHW.shape[3] > pixels:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    return watch


def test_a_batch_out_of_memory_is_halved() -> None:
    tta = {"scales": [1, 1.5], "flip": True}
    pictures = images(*SIZES)
    wanted = run(predict(Convolution(), tta), *pictures)
    module = Convolution(watch=out_of_memory_above(48 * 48))  # one view of one image at the scale of 1.5
    worker = predict(module, tta)
    for result, one in zip(run(worker, *pictures), wanted, strict=True):
        np.testing.assert_array_equal(result.label_HW, one.label_HW)
    assert worker.batch_pixels < 3 * 1024
    assert worker.tile_pixels == 4_000_000


def test_an_image_out_of_memory_is_tiled() -> None:
    tta = {"scales": [0.75, 1.25], "flip": True}
    (picture,) = images((400, 500))
    (wanted,) = run(predict(Convolution(), tta), picture)
    module = Convolution(watch=out_of_memory_above(100_000))
    worker = predict(module, tta)
    (result,) = run(worker, picture)
    assert 65_536 <= worker.tile_pixels <= 200_000
    assert (result.label_HW == wanted.label_HW).mean() > 0.95  # type: ignore[union-attr]
    module.shapes.clear()
    run(worker, picture)
    assert all(height * width <= 100_000 for _, _, height, width in module.shapes)


def test_without_hope_the_image_is_too_large() -> None:
    worker = predict(Convolution(watch=out_of_memory_above(0)), {"scales": [2]})
    (result,) = worker([prepare(picture, PREPROCESS) for picture in images((600, 700))])
    assert isinstance(result, ImageTooLargeError)


def test_large_views_are_tiled_before_memory_runs_out() -> None:
    module = Convolution()
    worker = predict(module, {"scales": [1, 2]}, tile_pixels=65_536)
    run(worker, *images((200, 200)))  # 40,000 pixels, but 160,000 in the larger view
    assert max(height * width for _, _, height, width in module.shapes) <= 70_000


# --- configuration


def test_tta_is_part_of_the_version() -> None:
    def version(**settings: Any) -> str:
        config = ModelConfig.model_validate({"name": "unet_small", "options": {"width": 4}, **settings})
        return load_model(config, seed=0, tile_pixels=1).version

    plain = version()
    assert version(tta={}) == version(tta={"scales": [1]}) == plain
    versions = [plain, *(version(tta=tta) for tta in ({"flip": True}, {"scales": [2]}, {"window": {}}))]
    assert len(set(versions)) == 4


@pytest.mark.parametrize("settings", [{"tta": {"flip": True}}, {"tta": {}}])
def test_other_tasks_are_refused(settings: dict[str, Any]) -> None:
    config = ModelConfig.model_validate({"name": "maskrcnn_resnet50_fpn_v2", **settings})
    with pytest.raises(ConfigError, match=r"tta works on the maps of semantic and depth models.*task instance"):
        load_model(config, seed=0, tile_pixels=1)


def test_windows_need_a_model_that_can_see_a_part() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    config = ModelConfig.model_validate({"name": "dpt_depth", "tta": {"window": {}}})
    with pytest.raises(ConfigError, match=r"tta\.window works on models that can see a part of an image, 'dpt_depth'"):
        load_model(config, seed=0, tile_pixels=1)


def test_the_wrong_number_of_classes_is_said() -> None:
    worker = predict(Convolution(5), {"flip": True})
    with pytest.raises(ConfigError, match="gives 5 classes, taxonomy 'scenes' has 8"):
        worker.check()


def test_a_class_that_is_ruled_out_stays_finite() -> None:
    def ruled_out(batch: Any) -> list[Tensor]:
        values = [torch.zeros(3, *item.image_CHW.shape[1:]) for item in batch]
        for values_KHW in values:
            values_KHW[1] = -torch.inf
        return values

    item: Prepared = prepare(images((20, 30))[0], PREPROCESS)
    (values_KHW,) = augmented(
        [item], ruled_out, TtaConfig(scales=(1.0, 2.0)), preprocess=PREPROCESS, task="semantic", depth_kind=""
    )
    assert values_KHW.isfinite().all()
    np.testing.assert_allclose(values_KHW.exp()[0], 0.5, atol=1e-6)
