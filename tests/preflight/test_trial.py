"""Batch budgets: which are tried, when a trial ends, and which one is proposed."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.errors import PredictError
from pipeline.models.load import LoadedModel, load_model
from pipeline.preflight.trial import Point, Trial, best_budget, ladder, seconds_at, trial
from pipeline.stages.prepare import Prepared, prepare

CPU = torch.device("cpu")
PIXELS = 64 * 64


def points(*values: tuple[int, float]) -> tuple[Point, ...]:
    return tuple(
        Point(budget_pixels=budget, images=1, seconds_per_image=seconds, peak_bytes=0) for budget, seconds in values
    )


def made(label: str, ended: str, *values: tuple[int, float]) -> Trial:
    return Trial(label=label, padded=(1, 1), first_s=0.0, points=points(*values), ended=ended)


class Loaded(nn.Module):
    """A convolution that has memory for `most` images at once; `seen` are the batches that came."""

    def __init__(self, inner: nn.Module, most: int | None = None, broken: bool = False) -> None:
        super().__init__()
        self.inner, self.most, self.broken = inner, most, broken
        self.seen: list[int] = []

    def forward(self, image_BCHW: Tensor) -> Tensor:
        self.seen.append(len(image_BCHW))
        if self.broken and image_BCHW[:, 0].std() > 0.1:
            raise ValueError("not this image")
        if self.most is not None and len(image_BCHW) > self.most:
            raise RuntimeError("CUDA out of memory (as if)")
        result: Tensor = self.inner(image_BCHW)
        return result


def model(most: int | None = None, broken: bool = False) -> LoadedModel:
    loaded = load_model(ModelConfig(name="unet_small"), seed=0, tile_pixels=1 << 22)
    object.__setattr__(loaded, "module", Loaded(loaded.module, most, broken))
    return loaded


def images(loaded: LoadedModel, *sizes: tuple[int, int]) -> list[Prepared]:
    rng = np.random.default_rng(0)
    return [prepare(rng.integers(0, 256, (*size, 3)).astype(np.uint8), loaded.preprocess) for size in sizes]


def run(loaded: LoadedModel, *, own: int = 4 * PIXELS, most: int = 16, seconds: float = 60.0) -> Trial:
    return trial(
        loaded,
        images(loaded, (64, 64), (32, 64), (64, 64)),
        device=CPU,
        own_pixels=own,
        base_pixels=PIXELS,
        tile_pixels=1 << 22,
        most_images=most,
        seconds=seconds,
    )


def test_budgets_double_and_the_configs_own_is_among_them() -> None:
    assert ladder(100, 500, 900) == [100, 200, 400, 500, 800]
    assert ladder(100, 10, 300) == [100, 200]
    assert ladder(100, 5000, 300) == [100, 200, 300]


def test_batches_are_made_of_the_most_common_shape_up_to_a_files_images() -> None:
    loaded = model()
    found = run(loaded, own=16 * PIXELS, most=8)
    assert found.padded == (64, 64)
    assert [point.images for point in found.points][:4] == [1, 2, 4, 8]
    assert [point.budget_pixels for point in found.points] == [PIXELS * 2**step for step in range(len(found.points))]
    assert max(loaded.module.seen) == 8
    assert all(point.seconds_per_image > 0 and point.peak_bytes > 1 << 20 for point in found.points)


def test_a_trial_ends_where_memory_does() -> None:
    found = run(model(most=3))
    assert found.ended == "memory"
    assert [point.problem for point in found.points] == [None, None, "out of memory"]
    assert seconds_at(found, 4 * PIXELS) is None
    assert seconds_at(found, 2 * PIXELS) == found.points[1].seconds_per_image
    assert best_budget([found]) in (PIXELS, 2 * PIXELS)


def test_a_trial_ends_before_the_memory_that_is_left_does(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter(range(1000, 100_000, 1000))
    monkeypatch.setattr("pipeline.preflight.trial.peak_bytes", lambda _: (next(used), None))
    monkeypatch.setattr("pipeline.preflight.trial.free_bytes", lambda _: 2000)
    loaded = model()
    found = run(loaded)
    # 1000 at rest and 1000 for each step: one image more fits into 70 % of 2000, two more do not.
    assert (found.ended, [point.images for point in found.points]) == ("memory", [1, 2])
    assert max(loaded.module.seen) == 2


def test_a_trial_ends_when_its_time_is_up() -> None:
    found = run(model(), seconds=0.0)
    assert (found.ended, len(found.points)) == ("time", 1)


def test_a_model_that_predicts_nothing_is_an_error() -> None:
    with pytest.raises(PredictError, match="model unet_small: PredictError: ValueError: not this image"):
        run(model(broken=True))


def test_the_smallest_budget_that_is_nearly_the_fastest_is_proposed() -> None:
    assert best_budget([made("a", "no gain", (100, 2.0), (200, 1.02), (400, 1.0))]) == 200
    assert best_budget([made("a", "no gain", (100, 1.0), (200, 1.0), (400, 1.1))]) == 100
    assert best_budget([]) is None


def test_models_share_one_budget_that_all_have_memory_for() -> None:
    fast = made("fast", "no gain", (100, 0.2), (200, 0.1), (400, 0.05), (800, 0.04))
    slow = made("slow", "memory", (100, 2.0), (200, 1.0))
    assert best_budget([fast, slow]) == 200
    # One that ended for want of gain goes on as it was.
    early = made("early", "no gain", (100, 2.0), (200, 2.0))
    assert seconds_at(early, 800) == 2.0
    assert best_budget([fast, early]) == 200  # 2.1 s are within 3 % of the 2.04 s at 800
