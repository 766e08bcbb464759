"""Augmentation: the same for the same image wherever it runs, and the same for an image and all of its targets."""

import hashlib
import json
import multiprocessing
import random
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from pipeline.errors import ConfigError, TargetMismatchError
from pipeline.images import decode_image
from pipeline.masks import decode_panoptic_png
from pipeline.taxonomy import load_taxonomy
from pipeline.training.augment import (
    AugmentOptions,
    Change,
    Example,
    apply_change,
    augment,
    draw_change,
    make_example,
    resize,
)
from pipeline.training.targets import instance_masks, torchvision_target

LAW = settings(deadline=None, max_examples=40)
HEIGHT, WIDTH = 60, 100
STRONG = AugmentOptions(
    scale=(0.5, 2.0), crop=(48, 64), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
)
PLAIN = AugmentOptions()
SPREAD = 2.0  # of brightness per pixel in `scene`


def scene(height: int = HEIGHT, width: int = WIDTH) -> Example:
    """Every value says where it came from: red is twice x, green is twice y, depth is exact, ids count 8 x 8 blocks."""
    y_HW, x_HW = np.mgrid[:height, :width]
    block_HW = (y_HW // 8) * 16 + x_HW // 8
    masks_NHW = torch.stack([torch.from_numpy(block_HW == index) for index in (0, 17, 40, 75)]).byte()
    return make_example(
        np.stack([SPREAD * x_HW, SPREAD * y_HW, 0 * x_HW + 90], axis=2).astype(np.uint8),
        semantic_HW=(block_HW % 200).astype(np.uint8),
        panoptic_HW=block_HW + 2**24 - 500,
        depth_HW=1000.0 * y_HW + x_HW + 1,
        masks_NHW=masks_NHW,
        labels_N=torch.tensor([0, 17, 40, 75]),
    )


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(
            found[name].as_subclass(Tensor), values.as_subclass(Tensor), rtol=0, atol=0, equal_nan=True
        )


def fingerprint(task: tuple[int, str]) -> str:
    epoch, image_id = task
    found = augment(scene(), STRONG, seed=1, epoch=epoch, image_id=image_id)
    digest = hashlib.sha256()
    for name, values in sorted(found.items()):
        digest.update(name.encode() + values.contiguous().numpy().tobytes())
    return digest.hexdigest()


TASKS = [(epoch, f"shard-{n:03}.tar/{n:06}.jpg") for epoch in range(2) for n in range(12)]


def test_order_threads_and_processes_change_nothing() -> None:
    expected = {task: fingerprint(task) for task in TASKS}
    shuffled = random.Random(0).sample(TASKS, len(TASKS))
    assert {task: fingerprint(task) for task in shuffled} == expected
    with ThreadPoolExecutor(4) as pool:
        assert dict(zip(shuffled, pool.map(fingerprint, shuffled), strict=True)) == expected
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert dict(zip(TASKS, pool.map(fingerprint, TASKS), strict=True)) == expected
    assert len(set(expected.values())) == len(TASKS)


def test_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    first = fingerprint(TASKS[0])
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(1)
    assert fingerprint(TASKS[0]) == first


def test_the_draws_are_what_an_earlier_run_drew() -> None:
    """A run that is resumed by a later version augments as it began: written down when this was made."""
    options = AugmentOptions(scale=(0.5, 2.0), crop=(48, 64), flip=0.5, brightness=0.4, hue=0.1)
    change = draw_change(options, 480, 640, seed=7, epoch=3, image_id="train-000001.tar/000042")
    uniforms = [
        int.from_bytes(part, "little") / 2**64
        for part in np.frombuffer(
            hashlib.blake2b(b'[7, 3, "train-000001.tar/000042"]', digest_size=64).digest(), "V8"
        ).tolist()
    ]
    zoom = 0.5 + 1.5 * uniforms[0]
    assert change.zoom == pytest.approx(zoom, abs=1e-12)
    assert (change.height, change.width) == (round(48 / zoom), round(64 / zoom))
    assert (change.top, change.left) == (
        int(uniforms[1] * (481 - change.height)),
        int(uniforms[2] * (641 - change.width)),
    )
    assert change.flip == (uniforms[3] < 0.5)
    assert change.brightness == pytest.approx(1 + 0.4 * (2 * uniforms[4] - 1), abs=1e-12)
    assert (change.contrast, change.saturation) == (1, 1)
    assert change.hue == pytest.approx(0.1 * (2 * uniforms[7] - 1), abs=1e-12)


def test_draws_are_spread_evenly_and_apart() -> None:
    options = AugmentOptions(
        scale=(0.5, 1.5), crop=(40, 40), flip=0.5, brightness=0.5, contrast=0.5, saturation=0.5, hue=0.5
    )
    changes = [draw_change(options, 400, 400, seed=0, epoch=n // 500, image_id=str(n % 500)) for n in range(4000)]
    columns = np.array(
        [
            (c.zoom, c.top / (400 - c.height), c.left / (400 - c.width), c.brightness, c.contrast, c.saturation, c.hue)
            for c in changes
        ]
    )
    flips = np.array([c.flip for c in changes])
    assert 0.46 < flips.mean() < 0.54
    low, high = [0.5, 0, 0, 0.5, 0.5, 0.5, -0.5], [1.5, 1, 1, 1.5, 1.5, 1.5, 0.5]
    for column, (least, most) in zip(columns.T, zip(low, high, strict=True), strict=True):
        counts, _ = np.histogram(column, bins=10, range=(least, most))
        assert counts.sum() == 4000
        assert counts.min() > 300
        assert counts.max() < 500
    correlation = np.corrcoef(np.concatenate([columns, flips[:, None]], axis=1).T)
    assert np.abs(correlation - np.eye(8)).max() < 0.06


def test_an_option_moves_no_draw_of_another() -> None:
    key: dict[str, Any] = {"seed": 1, "epoch": 2, "image_id": "a"}
    strong = draw_change(STRONG, HEIGHT, WIDTH, **key)
    geometry = draw_change(AugmentOptions(scale=(0.5, 2.0), crop=(48, 64)), HEIGHT, WIDTH, **key)
    for name in ("top", "left", "height", "width", "out_height", "out_width", "zoom"):
        assert getattr(strong, name) == getattr(geometry, name)
    assert not geometry.flip
    flipped = draw_change(AugmentOptions(flip=1.0), HEIGHT, WIDTH, **key)
    assert (flipped.top, flipped.left, flipped.height, flipped.width, flipped.flip) == (0, 0, HEIGHT, WIDTH, True)


def test_the_defaults_change_nothing() -> None:
    assert_equal(augment(scene(), PLAIN, seed=0, epoch=0, image_id="a"), scene())


def test_an_example_is_left_as_it_was() -> None:
    example = scene()
    for n in range(8):
        augment(example, STRONG, seed=0, epoch=n, image_id="a")
    assert_equal(example, scene())


def test_types_say_what_each_value_is() -> None:
    found = augment(scene(), STRONG, seed=0, epoch=0, image_id="a")
    assert isinstance(found["image"], tv_tensors.Image)
    assert all(isinstance(found[name], tv_tensors.Mask) for name in ("semantic", "panoptic", "depth", "masks"))
    assert (found["image"].dtype, found["depth"].dtype) == (torch.uint8, torch.float32)
    assert (found["semantic"].dtype, found["panoptic"].dtype) == (torch.uint8, torch.int32)


def source(depth_HW: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of an augmented `scene` came from, rows and columns, by its depth; NaN in padding."""
    places = depth_HW.as_subclass(Tensor).double().numpy() - 1
    return places // 1000, places % 1000


CHANGES = st.builds(
    Change,
    top=st.integers(-30, 40),
    left=st.integers(-40, 60),
    height=st.integers(10, 90),
    width=st.integers(10, 120),
    out_height=st.integers(8, 90),
    out_width=st.integers(8, 120),
    flip=st.booleans(),
)


@LAW
@given(CHANGES, st.sampled_from(["void", "mirror"]))
def test_image_and_targets_move_alike(change: Change, pad: Any) -> None:
    example = scene()
    if pad == "mirror":
        example = {name: values for name, values in example.items() if name not in ("masks", "labels")}
    found = apply_change(example, change, AugmentOptions(pad=pad))
    size = (change.out_height, change.out_width)
    assert all(values.shape[-2:] == size for name, values in found.items() if name != "labels")
    y_HW, x_HW = source(found["depth"])
    known_HW = np.isfinite(y_HW)
    assert known_HW.all() or pad == "void"
    if not known_HW.any():
        return
    # Every target came from the same source pixel.
    block_HW = ((y_HW // 8) * 16 + x_HW // 8)[known_HW].astype(int)
    semantic_HW, panoptic_HW = found["semantic"].numpy(), found["panoptic"].numpy()
    np.testing.assert_array_equal(semantic_HW[known_HW], block_HW % 200)
    np.testing.assert_array_equal(panoptic_HW[known_HW], block_HW + 2**24 - 500)
    assert (semantic_HW[~known_HW] == 255).all()
    assert (panoptic_HW[~known_HW] == 0).all()
    if pad == "void":
        for label, mask_HW in zip(found["labels"].tolist(), found["masks"].numpy(), strict=True):
            np.testing.assert_array_equal(mask_HW[known_HW], block_HW == label)
            assert not mask_HW[~known_HW].any()
        assert found["masks"].flatten(1).any(1).all()
        assert set(found["labels"].tolist()) == {0, 17, 40, 75} & set(block_HW.tolist())
    # And it is the pixel that fills the place by the geometry of resizing, to half a pixel.
    rows = change.top + (np.arange(size[0]) + 0.5) * change.height / size[0] - 0.5
    columns = change.left + (np.arange(size[1]) + 0.5) * change.width / size[1] - 0.5
    columns = columns[::-1] if change.flip else columns
    inside_HW = known_HW & ((rows > 0.5) & (rows < HEIGHT - 1.5))[:, None]
    inside_HW &= (columns > 0.5) & (columns < WIDTH - 1.5)
    assert np.abs(y_HW - rows[:, None])[inside_HW].max(initial=0) <= 0.5 + 1e-3
    assert np.abs(x_HW - columns)[inside_HW].max(initial=0) <= 0.5 + 1e-3
    # The image is interpolated, so it tells its place more finely; near padding and the window's edges it is blended.
    reach = np.ceil(2 * max(1, size[0] / change.height, size[1] / change.width)).astype(int) + 1
    deep_HW = inside_HW.copy()
    for axis in (0, 1):
        for shift in range(-reach, reach + 1):
            deep_HW &= np.roll(inside_HW, shift, axis)
    deep_HW[:reach], deep_HW[-reach:], deep_HW[:, :reach], deep_HW[:, -reach:] = False, False, False, False
    red_HW, green_HW = found["image"].numpy()[:2].astype(float) / SPREAD
    assert np.abs(red_HW - columns)[deep_HW].max(initial=0) <= 0.8
    assert np.abs(green_HW - rows[:, None])[deep_HW].max(initial=0) <= 0.8


@pytest.mark.parametrize(
    ("height", "width", "most"),
    [(20, 20, 0.1), (15, 25, 0.55), (30, 50, 0.55), (12, 20, 0.1), (120, 200, 0.3), (45, 70, 0.2)],
)
def test_targets_are_not_shifted_against_their_image(height: int, width: int, most: float) -> None:
    """By less than half a pixel where centres fall between two (even factors), else hardly; torchvision's own resizing
    of masks is 1 pixel off when shrinking by 3 and 1.5 when shrinking by 4."""
    found = resize(scene(), height, width)
    y_HW, x_HW = source(found["depth"])
    red_HW, green_HW = found["image"].numpy()[:2].astype(float) / SPREAD
    middle = np.s_[5:-5, 5:-5]
    assert abs((x_HW - red_HW)[middle].mean()) <= most
    assert abs((y_HW - green_HW)[middle].mean()) <= most


@LAW
@given(st.integers(0, 10**6), st.sampled_from(["void", "mirror"]))
def test_no_new_ids_and_no_new_depths(seed: int, pad: Any) -> None:
    rng = np.random.default_rng(seed)
    example = make_example(
        rng.integers(0, 256, (37, 51, 3)).astype(np.uint8),
        semantic_HW=rng.choice([0, 7, 100, 255], (37, 51)).astype(np.uint8),
        panoptic_HW=rng.choice([0, 1, 2**24 - 1], (37, 51)),
        depth_HW=rng.choice([0.5, 3.25, np.nan], (37, 51)),
    )
    options = AugmentOptions(scale=(0.3, 3.0), crop=(40, 40), flip=0.5, pad=pad)
    found = augment(example, options, seed=seed, epoch=0, image_id="a")
    for name, added in (("semantic", {255}), ("panoptic", {0})):
        assert set(found[name].unique().tolist()) <= set(example[name].unique().tolist()) | added
    known = found["depth"][found["depth"].isfinite()]
    assert set(known.unique().tolist()) <= {0.5, 3.25}


def test_a_crop_at_full_size_is_a_cut() -> None:
    example = scene()
    change = Change(top=7, left=11, height=30, width=41, out_height=30, out_width=41)
    found = apply_change(example, change, PLAIN)
    for name in ("image", "semantic", "panoptic", "depth"):
        assert torch.equal(found[name], example[name][..., 7:37, 11:52])


def test_a_flip_is_a_flip() -> None:
    example = scene()
    found = augment(example, AugmentOptions(flip=1.0), seed=0, epoch=0, image_id="a")
    for name in ("image", "semantic", "panoptic", "depth", "masks"):
        assert torch.equal(found[name], example[name].flip(-1))
    assert torch.equal(found["labels"], example["labels"])


@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 4), (6, 1), (1, 1), (2, 2)])
def test_mirror_padding_is_numpys_reflection(height: int, width: int) -> None:
    """Also where the padding is wider than the image, which is then reflected again and again."""
    rng = np.random.default_rng(0)
    image_HWC = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    example = make_example(image_HWC, semantic_HW=image_HWC[..., 0], depth_HW=image_HWC[..., 1])
    change = Change(top=-9, left=-4, height=height + 13, width=width + 14, out_height=height + 13, out_width=width + 14)
    found = apply_change(example, change, AugmentOptions(pad="mirror"))
    around = [(9, 4), (4, 10)]
    expected = np.pad(image_HWC, [*around, (0, 0)], mode="reflect")
    np.testing.assert_array_equal(found["image"].numpy().transpose(1, 2, 0), expected)
    np.testing.assert_array_equal(found["semantic"].numpy(), expected[..., 0])
    np.testing.assert_array_equal(found["depth"].numpy(), expected[..., 1])


def test_void_padding_is_no_evidence() -> None:
    example = scene()
    change = Change(top=-3, left=-2, height=HEIGHT + 5, width=WIDTH + 6, out_height=HEIGHT + 5, out_width=WIDTH + 6)
    found = apply_change(example, change, AugmentOptions(fill=(1, 2, 3), void_id=201))
    inner = np.s_[..., 3 : 3 + HEIGHT, 2 : 2 + WIDTH]
    for name, void in (("semantic", 201.0), ("panoptic", 0.0), ("depth", np.nan), ("masks", 0.0)):
        values = found[name].numpy()
        np.testing.assert_array_equal(values[inner], example[name].numpy())
        assert values.dtype == example[name].numpy().dtype
        border = np.ones(values.shape, bool)
        border[inner] = False
        np.testing.assert_array_equal(values[border], np.full(border.sum(), void))
    assert found["image"][:, 0, 0].tolist() == [1, 2, 3]
    assert torch.equal(found["image"][inner], example["image"])


def test_instances_are_not_mirrored() -> None:
    change = Change(top=-1, left=0, height=HEIGHT, width=WIDTH, out_height=HEIGHT, out_width=WIDTH)
    with pytest.raises(ConfigError, match="instances cannot be padded by mirroring"):
        apply_change(scene(), change, AugmentOptions(pad="mirror"))


def test_a_crop_keeps_the_instances_that_it_shows() -> None:
    example = scene()
    change = Change(top=4, left=4, height=20, width=20, out_height=40, out_width=40, flip=True)
    found = apply_change(example, change, PLAIN)
    assert found["labels"].tolist() == [0, 17]
    target = torchvision_target(found["masks"], found["labels"])
    # Block 0 is cut to 4 x 4 pixels in the corner, block 17 (rows and columns 8 to 15) is whole.
    assert target["boxes"].tolist() == [[32, 0, 40, 8], [16, 8, 32, 24]]
    nothing = apply_change(example, Change(top=30, left=60, height=4, width=4, out_height=8, out_width=8), PLAIN)
    assert (nothing["masks"].shape, nothing["labels"].shape) == ((0, 8, 8), (0,))
    assert torchvision_target(nothing["masks"], nothing["labels"])["boxes"].shape == (0, 4)


@pytest.mark.parametrize("zoom_depth", [False, True])
def test_metric_depth_stays_unless_the_camera_is_said_to_move(zoom_depth: bool) -> None:
    example = make_example(np.zeros((40, 40, 3), np.uint8), depth_HW=np.full((40, 40), 6.0))
    options = AugmentOptions(resize=20, scale=(2.0, 2.0), crop=(20, 20), zoom_depth=zoom_depth)
    found = augment(example, options, seed=0, epoch=0, image_id="a")
    # Bringing the image to the model's size (40 -> 20) is no zoom; the factor of 2 is.
    assert found["depth"].unique().tolist() == [3.0 if zoom_depth else 6.0]
    assert isinstance(found["depth"], tv_tensors.Mask)


def test_colours_are_torchvisions_and_touch_no_target() -> None:
    example = scene()
    rng = np.random.default_rng(0)
    example["image"] = tv_tensors.Image(torch.from_numpy(rng.integers(0, 256, (3, HEIGHT, WIDTH)).astype(np.uint8)))
    change = Change(
        top=0,
        left=0,
        height=HEIGHT,
        width=WIDTH,
        out_height=HEIGHT,
        out_width=WIDTH,
        brightness=1.2,
        contrast=0.7,
        saturation=1.4,
        hue=-0.08,
    )
    found = apply_change(example, change, PLAIN)
    expected = transforms.adjust_contrast(transforms.adjust_brightness(example["image"], 1.2), 0.7)
    expected = transforms.adjust_hue(transforms.adjust_saturation(expected, 1.4), -0.08)
    assert torch.equal(found.pop("image"), expected)
    assert_equal(found, {name: values for name, values in example.items() if name != "image"})


@pytest.mark.parametrize(("zoom", "resized"), [(0.5, None), (1.0, None), (2.0, None), (1.0, 30), (1.5, 120)])
def test_the_window_is_the_crop_over_the_magnification(zoom: float, resized: int | None) -> None:
    options = AugmentOptions(resize=resized, scale=(zoom, zoom), crop=(24, 32))
    change = draw_change(options, HEIGHT, WIDTH, seed=0, epoch=0, image_id="a")
    magnification = zoom * (1 if resized is None else resized / HEIGHT)
    assert abs(change.height - 24 / magnification) <= 0.5
    assert abs(change.width - 32 / magnification) <= 0.5
    assert (change.out_height, change.out_width) == (24, 32)
    whole = draw_change(
        AugmentOptions(resize=resized, scale=(zoom, zoom)), HEIGHT, WIDTH, seed=0, epoch=0, image_id="a"
    )
    assert (whole.top, whole.left, whole.height, whole.width) == (0, 0, HEIGHT, WIDTH)
    assert (whole.out_height, whole.out_width) == (round(HEIGHT * magnification), round(WIDTH * magnification))


def test_max_size_bounds_the_long_side() -> None:
    change = draw_change(AugmentOptions(resize=600, max_size=200), HEIGHT, WIDTH, seed=0, epoch=0, image_id="a")
    assert (change.out_height, change.out_width) == (120, 200)


@LAW
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 10**6), st.sampled_from(["void", "mirror"]))
def test_every_image_size_gives_the_crop(height: int, width: int, seed: int, pad: Any) -> None:
    options = AugmentOptions(scale=(0.1, 4.0), crop=(32, 48), flip=0.5, hue=0.1, pad=pad)
    example = make_example(np.zeros((height, width, 3), np.uint8), semantic_HW=np.zeros((height, width), np.uint8))
    found = augment(example, options, seed=seed, epoch=0, image_id="a")
    assert found["image"].shape == (3, 32, 48)
    assert found["semantic"].shape == (32, 48)
    present = set(found["semantic"].unique().tolist())
    assert present <= ({0, 255} if pad == "void" else {0})
    # A window is at most ten times the crop, and one pixel of the crop is ten of it: what is larger cannot be missed.
    assert 0 in present or min(height, width) < 10


def test_resizing_for_validation_does_nothing_else() -> None:
    example = scene()
    noise = np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH)).astype(np.uint8)
    example["image"] = tv_tensors.Image(torch.from_numpy(noise))
    assert_equal(resize(example, HEIGHT, WIDTH), example)
    small = resize(example, 30, 50)
    assert small["image"].shape == (3, 30, 50)
    assert torch.equal(small["image"], transforms.resize_image(example["image"], [30, 50], antialias=True))
    # A mask of one pixel is gone at a quarter of the size, and its label with it.
    example["masks"][0] = 0
    example["masks"][0, 1, 1] = 1
    assert resize(example, 15, 25)["labels"].tolist() == [17, 40, 75]


@pytest.mark.parametrize("name", ["semantic_HW", "panoptic_HW", "depth_HW"])
def test_a_target_of_another_size_is_refused(name: str) -> None:
    with pytest.raises(TargetMismatchError, match=rf"\({name[:-3]}\) to be 6x4 as the image, got 4x6"):
        make_example(np.zeros((4, 6, 3), np.uint8), **{name: np.zeros((6, 4), np.uint8)})


def test_masks_of_another_size_are_refused() -> None:
    masks_NHW, labels_N = torch.zeros(2, 4, 5, dtype=torch.uint8), torch.ones(2, dtype=torch.int64)
    with pytest.raises(TargetMismatchError, match=r"\(masks\) to be 6x4 as the image, got 5x4"):
        make_example(np.zeros((4, 6, 3), np.uint8), masks_NHW=masks_NHW, labels_N=labels_N)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.0, 1.0)}, "scale must be two finite factors over 0"),
        ({"scale": (2.0, 1.0)}, "scale must be two finite factors over 0"),
        ({"scale": (1.0, float("inf"))}, "scale must be two finite factors over 0"),
        ({"crop": (0, 5)}, "crop must be height and width of 1 or more"),
        ({"pad": "edge"}, "pad must be void or mirror, got 'edge'"),
        ({"flip": 1.1}, "flip must be 0 to 1.0, got 1.1"),
        ({"hue": 0.6}, "hue must be 0 to 0.5, got 0.6"),
        ({"contrast": -0.1}, "contrast must be 0 to 1.0, got -0.1"),
        ({"saturation": float("nan")}, "saturation must be 0 to 1.0, got nan"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentOptions(**options)


def test_real_images_and_targets_move_alike(shared_data: Path) -> None:
    """Each panoptic segment as a mask of its own: cutting the map and then the masks is the same as the other way."""
    folder = shared_data / "coco128"
    tree = json.loads((folder / "panoptic.json").read_text())
    names = {item["id"]: item["file_name"] for item in tree["images"]}
    for annotation in tree["annotations"][:12]:
        path = next(folder.rglob(names[annotation["image_id"]]))
        image_HWC = decode_image(path.read_bytes())
        height, width = image_HWC.shape[:2]
        data = (folder / "panoptic" / annotation["file_name"]).read_bytes()
        segment_HW = decode_panoptic_png(data, width=width, height=height)
        ids = torch.tensor([segment["id"] for segment in annotation["segments_info"]])
        masks_NHW = (torch.from_numpy(segment_HW) == ids[:, None, None]).byte()
        example = make_example(image_HWC, panoptic_HW=segment_HW, masks_NHW=masks_NHW, labels_N=ids)
        found = augment(example, STRONG, seed=0, epoch=0, image_id=path.name)
        for mask_HW, identifier in zip(found["masks"], found["labels"], strict=True):
            assert torch.equal(mask_HW, (found["panoptic"] == identifier).byte())
        assert set(found["labels"].tolist()) == set(found["panoptic"].unique().tolist()) - {0}


def test_real_instances_stay_valid_targets(shared_data: Path) -> None:
    folder = shared_data / "coco128"
    tree = json.loads((folder / "instances.json").read_text())
    space, kept = load_taxonomy("coco80"), 0
    options = AugmentOptions(scale=(0.5, 2.0), crop=(240, 320), flip=0.5)
    for image in tree["images"][:16]:
        annotations = [item for item in tree["annotations"] if item["image_id"] == image["id"]]
        found = instance_masks(annotations, height=image["height"], width=image["width"], taxonomy=space)
        with Image.open(next(folder.rglob(image["file_name"]))) as picture:
            image_HWC = np.asarray(picture.convert("RGB"))
        example = make_example(image_HWC, masks_NHW=found.masks_NHW, labels_N=found.labels_N)
        target_of = augment(example, options, seed=0, epoch=0, image_id=image["file_name"])
        target = torchvision_target(target_of["masks"], target_of["labels"])
        boxes_N4 = target["boxes"]
        assert ((boxes_N4[:, 2:] - boxes_N4[:, :2]) >= 1).all()
        assert (boxes_N4 >= 0).all()
        assert (boxes_N4[:, [0, 2]] <= 320).all()
        assert (boxes_N4[:, [1, 3]] <= 240).all()
        kept += len(boxes_N4)
    assert kept > 50
