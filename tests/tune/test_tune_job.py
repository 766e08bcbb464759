"""`maskmill tune` as a user calls it, with the measuring in this process; and the process that it is in otherwise."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import tune
from pipeline.config import LabelConfig
from pipeline.configfile import load_config
from pipeline.models.load import load_model
from pipeline.preflight.sampling import choose_units
from pipeline.sources.registry import open_source
from pipeline.tune import apart
from pipeline.tune.apart import Apart
from pipeline.tune.measure import Tuner
from pipeline.tune.search import Failed, Timed
from pipeline.tune.settings import Setting
from pipeline.units import plan_table

CONFIG = """\
# a comment
source: {{format: scenes, count: 8, unit_images: 4, width: 96, height: 64}}
models:
  - name: {model}
    weights: {weights}
output:
  uri: {out}
  rows_per_file: 4
"""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Here:
    """Apart's methods in this process."""

    def __init__(self, *given: Any, limit_s: float, **more: Any) -> None:
        tuner = Tuner(*given, **more)
        self.start, self.context, self.measure, self.budget = tuner.start, tuner.context, tuner.measure, tuner.budget

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    def write(model: str = "unet_small", weights: str = "bundled:unet_small_scenes") -> Path:
        path = tmp_path / "label.yaml"
        path.write_text(CONFIG.format(model=model, weights=weights, out=tmp_path / "out"))
        return path

    return write


def tuner(path: Path, *overrides: str) -> Tuner:
    loaded = load_config(LabelConfig, str(path), overrides)
    units = choose_units(plan_table(open_source(loaded.source).plan()), 2, 0)
    return Tuner(loaded, 0, units, images=2, seed=0)


def test_a_config_comes_out_that_label_takes(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "Apart", Here)
    path = config()
    argv = [str(path), "--units", "2", "--images", "2", "--axes", "channels_last,batch,precision", "--tolerance", "0.5"]
    assert tune.main([*argv, "--json", "seed=3"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["model"] == "unet_small"
    verdicts = {trial["verdict"] for trial in found["trials"]}
    assert verdicts <= {"start", "taken", "refused"}
    assert all(trial["reason"] for trial in found["trials"] if trial["verdict"] == "refused")
    start = found["trials"][0]
    assert (start["loss"], start["equal"], start["failed"], start["images"]) == (0, 4, 0, 4)
    half = [trial for trial in found["trials"] if trial["options"].get("precision") == "bf16"]
    assert all(0 < trial["loss"] < 0.5 for trial in half)
    assert half
    copy = path.with_name("label.tuned.yaml")
    assert f"wrote {copy}" in err
    assert copy.read_text().startswith("# a comment\n")
    written = load_config(LabelConfig, str(copy))
    assert written.seed == 3
    assert written.models[0].options == found["best"]["options"]
    assert load_model(written.models[0], seed=0, tile_pixels=1 << 22).precision == found["best"]["options"]["precision"]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--axes", "speed"], "--axes must be of"),
        (["--tolerance", "-1"], "--tolerance must be 0 or more"),
        (["--units", "0"], "--units must be above 0"),
        (["--model", "other"], "no model 'other'"),
    ],
)
def test_what_is_refused(
    argv: list[str], text: str, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.main([str(config()), *argv]) == 2
    assert text in capsys.readouterr().err


def test_a_setting_that_cannot_be_is_a_failure_with_its_reason(config: Callable[..., Path]) -> None:
    found = tuner(config()).measure(Setting().with_options(precision="int8_dynamic"))
    assert isinstance(found, Failed)
    assert "the model has none" in found.reason


def test_smaller_inputs_lose(config: Callable[..., Path]) -> None:
    measuring = tuner(config())
    whole, half, tiny = (
        measuring.measure(measuring.start.with_options(**change)) for change in ({}, {"max_size": 64}, {"max_size": 32})
    )
    assert isinstance(whole, Timed)
    assert isinstance(half, Timed)
    assert isinstance(tiny, Timed)
    assert whole.loss == 0 < half.loss < tiny.loss
    assert whole.equal == 4
    assert half.equal == 0


def test_depth_is_held_against_depth(config: Callable[..., Path]) -> None:
    measuring = tuner(config("unet_small_depth", "none"))
    found = measuring.measure(measuring.start.with_options(precision="bf16"))
    assert isinstance(found, Timed)
    assert set(found.figures) == {"AbsRel"}
    assert 0 < found.loss < 0.1


def _answer(connection: Any, *_: Any) -> None:
    """What a process with a Tuner does, for settings of which some end it or never answer."""
    while True:
        try:
            _, (what,) = connection.recv()
        except EOFError:
            return
        if what == "end":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            signal.pause()
        connection.send(what)


def test_a_process_that_ends_or_hangs_is_a_failure_and_the_next_one_starts(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fork has what is patched here, and starts in no time.
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(apart.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(apart, "_serve", _answer)
    ended = Failed("its process ended (signal 9), as by the system when memory ran out")
    answers: dict[Any, Any] = {"a": "a", "end": ended, "b": "b", "hang": Failed("no end within 0.5 s"), "c": "c"}
    with Apart(load_config(LabelConfig, str(config())), 0, [], images=1, seed=0, limit_s=0.5) as measuring:
        for asked, answer in answers.items():
            assert measuring.measure(asked) == answer
