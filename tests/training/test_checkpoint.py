"""Checkpoints: whole or not there, bit for bit, on local and object storage, whatever fails while they are written."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from s3_endpoint import S3
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.errors import CheckpointError, StorageError
from pipeline.models.load import load_model
from pipeline.training.checkpoint import Checkpoint, CheckpointStore
from pipeline.training.state_tree import join_state, split_state

FILES = ("model.safetensors", "spec.json", "state.safetensors", "state.json")


def tensors(seed: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(int(seed * 1000))
    return {"a": torch.randn(3, 4, generator=generator), "b.c": torch.tensor([1, 2**40]), "e": torch.zeros(0)}


def store(uri: Path | str, **options: Any) -> CheckpointStore:
    return CheckpointStore(str(uri), options.pop("storage", {}), pause=options.pop("pause", lambda _: None), **options)


def save(target: CheckpointStore, step: int, figure: float | None = None) -> Checkpoint:
    return target.save(
        step=step,
        model=tensors(step),
        spec={"model": "unet_small"},
        state=tensors(step + 0.5),
        meta={"step": step},
        figure=figure,
    )


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    assert store(tmp_path).newest() is None
    save(store(tmp_path), 3)
    save(store(tmp_path), 12)
    found = store(tmp_path).newest()
    assert found is not None
    checkpoint, model, state, meta = found
    assert checkpoint.step == 12
    assert equal(model, tensors(12))
    assert equal(state, tensors(12.5))
    assert meta == {"step": 12}


def test_it_works_on_object_storage(s3: S3) -> None:
    s3.client.create_bucket(Bucket="checkpoints")
    there = store("s3://checkpoints/run", storage=s3.options, keep=1)
    for step, figure in ((1, 0.5), (2, 0.7), (3, 0.6)):
        save(there, step, figure)
    found = there.newest()
    assert found is not None
    assert found[3] == {"step": 3}
    assert [item.step for item in there.list()] == [2, 3]
    best = there.best()
    assert best is not None
    there.publish(best, "s3://checkpoints/run/checkpoint", s3.options)
    keys = [item["Key"] for item in s3.client.list_objects_v2(Bucket="checkpoints")["Contents"]]
    assert sorted(key.rpartition("/")[2] for key in keys if "/checkpoint/" in key) == ["model.safetensors", "spec.json"]
    assert len(keys) == 2 + 2 * 5


@pytest.mark.parametrize(("lower", "kept"), [(False, [2, 4, 5]), (True, [1, 4, 5])])
def test_the_newest_and_the_best_are_kept(lower: bool, kept: list[int], tmp_path: Path) -> None:
    there = store(tmp_path, keep=2, lower_is_better=lower)
    for step, figure in ((1, 0.1), (2, 0.9), (3, 0.4), (4, None), (5, 0.9)):
        save(there, step, figure)
    assert [item.step for item in there.list()] == kept
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2 * len(kept)
    best = there.best()
    assert best is not None
    assert best.step == kept[0]


class Failing:
    """A file system whose n-th write, and those after it, fail half way through."""

    def __init__(self, fs: Any, writes: int, problem: Exception, times: int = 10**9) -> None:
        self.fs, self.writes, self.problem, self.times = fs, writes, problem, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fs, name)

    def pipe_file(self, path: str, data: bytes) -> None:
        self.writes -= 1
        if self.writes < 0 and self.times > 0:
            self.times -= 1
            self.fs.pipe_file(path, data[: len(data) // 2])
            raise self.problem
        self.fs.pipe_file(path, data)


class Killed(BaseException):
    """The process ends here: nothing is caught, nothing tidied up."""


@pytest.mark.parametrize("writes", range(5))
@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
def test_a_write_that_fails_leaves_the_one_before(writes: int, problem: Any, tmp_path: Path) -> None:
    there = store(tmp_path, keep=1)
    save(there, 1)
    good = there.fs
    there.fs = Failing(good, writes, problem)
    with pytest.raises(Killed if isinstance(problem, Killed) else StorageError):
        save(there, 2)
    again = store(tmp_path, keep=1)
    found = again.newest()
    assert found is not None
    assert found[0].step == 1
    assert equal(found[1], tensors(1))
    again.clean()
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {found[0].name, f"{found[0].name}.json"}
    save(again, 2)
    assert [item.step for item in again.list()] == [2]


def test_passing_faults_are_waited_out(tmp_path: Path) -> None:
    pauses: list[float] = []
    there = store(tmp_path, pause=pauses.append, attempts=4)
    there.fs = Failing(there.fs, 1, OSError("connection reset"), times=3)
    save(there, 7)
    assert pauses == [1.0, 2.0, 4.0]
    found = store(tmp_path).newest()
    assert found is not None
    assert equal(found[1], tensors(7))


class Unsteady:
    """A file system that some of the first reads and listings of fail."""

    def __init__(self, fs: Any, times: int) -> None:
        self.fs, self.times = fs, times

    def __getattr__(self, name: str) -> Any:
        if name in ("open", "ls") and self.times > 0:
            self.times -= 1
            raise OSError("connection reset")
        return getattr(self.fs, name)


@pytest.mark.parametrize("times", [1, 3, 4])
def test_passing_faults_of_reading_are_waited_out(times: int, tmp_path: Path) -> None:
    save(store(tmp_path), 7)
    pauses: list[float] = []
    there = store(tmp_path, pause=pauses.append, attempts=4)
    there.fs = Unsteady(there.fs, times)
    if times == 4:
        with pytest.raises(StorageError, match="connection reset"):
            there.newest()
    else:
        found = there.newest()
        assert found is not None
        assert equal(found[1], tensors(7))
    assert pauses == [1.0, 2.0, 4.0][:times]


def test_what_is_missing_is_not_waited_for(tmp_path: Path) -> None:
    pauses: list[float] = []
    there = store(tmp_path, pause=pauses.append)
    assert there.newest() is None
    gone = save(there, 1)
    (tmp_path / "checkpoints" / gone.name / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json is missing"):
        there.newest()
    assert pauses == []


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("damage", [damage_cut, damage_bit, damage_grown, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_damaged_file_is_found_and_the_one_before_is_taken(
    damage: Callable[[Path], None], file: str, tmp_path: Path
) -> None:
    there = store(tmp_path)
    first, second = save(there, 1), save(there, 2)
    damage(tmp_path / "checkpoints" / second.name / file)
    with pytest.raises(CheckpointError, match=file):
        there.read(second)
    found = there.newest()
    assert found is not None
    assert found[0].name == first.name
    damage(tmp_path / "checkpoints" / first.name / file)
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is whole"):
        there.newest()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}', "null", '{"step": "x", "figure": null, "files": {}}'])
def test_what_is_no_manifest_is_no_checkpoint(text: str, tmp_path: Path) -> None:
    there = store(tmp_path)
    save(there, 1)
    (tmp_path / "checkpoints" / "step-000000009-abc.json").write_text(text)
    assert [item.step for item in there.list()] == [1]


def test_storage_that_refuses_says_nothing_about_checkpoints(tmp_path: Path) -> None:
    there = store(tmp_path)
    save(there, 1)

    class Refusing(Failing):
        def open(self, path: str, mode: str) -> Any:
            raise PermissionError(path)

    there.fs = Refusing(there.fs, 0, OSError())
    with pytest.raises(StorageError, match="no permission"):
        there.newest()


def test_cleaning_takes_only_what_is_its_own(tmp_path: Path) -> None:
    there = store(tmp_path)
    there.clean()
    save(there, 1)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints" / "step-000000002-dead").mkdir()
    there.clean()
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert "notes.txt" in names
    assert "step-000000002-dead" not in names


STATES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(torch.tensor),
    lambda children: (
        st.lists(children, max_size=3)
        | st.tuples(children, children)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), children, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return [*one] == [*other] and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one)


@given(STATES)
def test_a_state_comes_back_through_json(state: Any) -> None:
    tree, parts = split_state(state)
    assert same(join_state(json.loads(json.dumps(tree)), parts), state)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", nn.Linear(1, 1)])
def test_a_state_of_objects_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="expected plain values and tensors"):
        split_state({"x": [value]})


@pytest.mark.parametrize("tree", [{"tensor": "nowhere"}, {}, {"list": 5}, {"a": 1, "b": 2}, {"mapping": [[1]]}])
def test_a_tree_that_is_no_state_is_refused(tree: Any) -> None:
    with pytest.raises(CheckpointError, match="not a training state"):
        join_state(tree, {})


def test_a_checkpoint_is_a_model(tmp_path: Path) -> None:
    """Its folder, and what is published, load as any weights do."""
    made = load_model(ModelConfig(name="unet_small", options={"width": 4}), seed=5, tile_pixels=10**6)
    spec = {"format": 1, "model": "unet_small", "taxonomy": "scenes", "options": {"width": 4}, "preprocess": {}}
    there = store(tmp_path)
    checkpoint = there.save(step=1, model=made.module.state_dict(), spec=spec, state={}, meta={})
    there.publish(checkpoint, str(tmp_path / "checkpoint"), {})
    for uri in (there.uri(checkpoint), str(tmp_path / "checkpoint")):
        loaded = load_model(ModelConfig(weights=uri), seed=0, tile_pixels=10**6)
        assert equal(dict(loaded.module.state_dict()), dict(made.module.state_dict()))
        assert loaded.version == made.version
    assert fsspec.filesystem("file").exists(there.uri(checkpoint))
