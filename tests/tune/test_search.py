"""The choice among settings: which one wins, given measurements, and why the others do not."""

import json
import math
from collections.abc import Callable, Mapping

import pytest

from pipeline.tune.search import Failed, Outcome, Search, Timed, search
from pipeline.tune.settings import AXES, Context, Setting, proposals
from pipeline.tune.text import lines

CPU = Context(
    accelerator=False,
    cores=4,
    threads=4,
    size=(480, 640),
    resize=None,
    max_size=None,
    channels_last=True,
    precision="fp32",
    compile=False,
)
START = Setting().with_options(precision="fp32")


def timed(milliseconds: float, loss: float = 0.0, failed: int = 0) -> Timed:
    return Timed(
        seconds_per_image=milliseconds / 1e3,
        setup_s=1.0,
        images=8,
        loss=loss,
        figures={"mIoU": 1 - loss},
        failed=failed,
    )


def measuring(table: Mapping[str, Outcome], default: Outcome) -> Callable[[Setting], Outcome]:
    """By what a setting changes beside precision=fp32; each setting is measured once."""
    asked: list[Setting] = []

    def measure(setting: Setting) -> Outcome:
        assert setting not in asked
        asked.append(setting)
        return table.get(setting.name.replace("precision=fp32", "").strip(), default)

    return measure


def run(table: Mapping[str, Outcome], axes: tuple[str, ...] = AXES, tolerance: float = 0.01) -> Search:
    found = search(START, CPU, measuring(table, timed(100)), axes=axes, tolerance=tolerance)
    assert isinstance(found, Search)
    return found


def test_nothing_faster_leaves_fp32() -> None:
    found = run({})
    assert found.best == START
    assert found.speedup == 1
    assert all(trial.verdict == "refused" and trial.reason for trial in found.trials[1:])
    assert list(lines(found))[-1].startswith("nothing is faster within a loss of 0.01")


def test_the_fastest_within_the_tolerance_wins_and_the_rest_say_why() -> None:
    found = run(
        {
            "precision=bf16": timed(50, 0.004),
            "precision=fp16": timed(20, 0.2),
            "precision=int8_dynamic": timed(60, 0.001),
            "precision=int8_weight_only": Failed("ConfigError: no linear layers"),
        },
        ("precision",),
    )
    assert dict(found.best.options) == {"precision": "bf16"}
    assert found.speedup == pytest.approx(2)
    reasons = {dict(trial.setting.options)["precision"]: trial.reason for trial in found.trials}
    assert "over the tolerance of 0.01 (mIoU 0.8000)" in reasons["fp16"]
    assert reasons["int8_dynamic"] == "precision=bf16 is faster"
    assert reasons["int8_weight_only"] == "ConfigError: no linear layers"
    assert "CPU" in reasons["tf32"]
    assert reasons["bf16"] == ""


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (timed(10, math.inf), "loss inf is over"),
        (timed(10, 0.0, failed=2), "2 of 8 images fail"),
        (timed(98), "1.02 times as fast"),
        (timed(200), "0.50 times as fast"),
        (Failed("its process ended (signal 9)"), "its process ended (signal 9)"),
    ],
)
def test_what_is_refused(outcome: Outcome, reason: str) -> None:
    found = run({"channels_last=false": outcome}, ("channels_last",))
    assert found.best == START
    assert reason in found.trials[-1].reason


def test_axes_build_on_each_other() -> None:
    table = {
        "torch_threads=2": timed(80),
        "torch_threads=1": timed(80),
        "precision=bf16 torch_threads=2": timed(40, 0.001),
        "precision=bf16 torch_threads=1": timed(30, 0.001),
        "compile=true precision=bf16 torch_threads=1": timed(10, 0.001),
    }
    found = run(table)
    # Of equally fast ones the first tried.
    assert found.best.name == "compile=true precision=bf16 torch_threads=1"
    assert found.speedup == pytest.approx(10)
    assert [trial.setting.name for trial in found.trials if trial.verdict == "taken"] == [
        "precision=fp32 torch_threads=1",
        "precision=bf16 torch_threads=1",
        "compile=true precision=bf16 torch_threads=1",
    ]
    assert "10.00 times fp32" in "\n".join(lines(found))


def test_the_same_measurements_make_the_same_choice() -> None:
    table = {"channels_last=false": timed(70), "precision=bf16": timed(60), "max_size=480": timed(50, 0.009)}
    assert run(table).plain() == run(table).plain()


def test_a_tolerance_of_nothing_takes_equal_labels_alone() -> None:
    table = {"channels_last=false": timed(50, 0.0), "channels_last=false precision=bf16": timed(20, 1e-9)}
    assert run(table, tolerance=0.0).best.name == "channels_last=false precision=fp32"


def test_time_ends_the_search() -> None:
    left = iter([True, True, False, False, False, False, False])
    found = search(
        START,
        CPU,
        measuring({}, timed(100)),
        axes=("threads", "channels_last"),
        tolerance=0.01,
        time_left=lambda: next(left),
    )
    assert isinstance(found, Search)
    assert [trial.verdict for trial in found.trials] == ["start", "refused", "refused", "not tried"]
    assert list(lines(found))


def test_fp32_that_does_not_work_is_the_search_s_failure() -> None:
    assert search(START, CPU, lambda _: Failed("no"), axes=AXES, tolerance=0.01) == Failed("no")


def test_json_has_no_value_that_json_lacks() -> None:
    found = run({"channels_last=false": timed(10, math.inf)}, ("channels_last",))
    tree = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert tree["trials"][1]["loss"] is None
    assert tree["best"] == {"options": {"precision": "fp32"}, "resources": {}}


def names(axis: str, context: Context = CPU, best: Setting = START, budget: int | None = None) -> list[str]:
    return [proposed.setting.name for proposed in proposals(axis, best, context, budget)]


def test_proposals() -> None:
    assert names("threads") == ["precision=fp32 torch_threads=1", "precision=fp32 torch_threads=2"]
    gpu = Context(**{**CPU.__dict__, "accelerator": True, "resize": 520})
    assert names("threads", gpu) == []
    assert names("resize") == ["max_size=480 precision=fp32", "max_size=320 precision=fp32"]
    assert names("resize", gpu) == ["precision=fp32 resize=384", "precision=fp32 resize=256"]
    assert names("batch") == []
    assert names("batch", budget=5) == ["precision=fp32 batch_pixels=5"]
    assert not any(proposed.refusal for proposed in proposals("precision", START, gpu))
    assert START.with_options(compile=True).overrides(2) == [
        "models.2.options.compile=true",
        "models.2.options.precision=fp32",
    ]
