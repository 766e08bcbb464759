"""Predictions of a table of ours: by shard, by an index of ids or names, only of the current version, and none lost."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from table_helpers import put

from pipeline.config import FilesSource, PredictionsConfig
from pipeline.errors import ConfigError, CorruptImageError, PredictError
from pipeline.masks import encode_label_map
from pipeline.predictions.base import Found, UnitPredictions, split_payload
from pipeline.predictions.table import TablePredictions
from pipeline.sources.base import Sample, Unit
from pipeline.table import RowTable
from pipeline.taxonomy import load_taxonomy
from pipeline.units import plan_table, row_to_unit

LABEL_HW = np.arange(12 * 20, dtype=np.uint8).reshape(20, 12) % 8


def row(image_id: str) -> dict[str, Any]:
    """Columns of a prediction of 12x20 pixels."""
    return {
        "image_id": image_id,
        "width": 12,
        "height": 20,
        "semantic": {"format": "png", "data": encode_label_map(LABEL_HW)},
    }


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """Shards a and b of model m, version v1; a stale version of a; a failed row; shard c of another model."""
    uri = str(tmp_path)
    table = RowTable.open(uri, {}, create=True)
    table.take_over()
    files = [
        *(put(uri, "a", [n], **row(f"a/{n}.jpg")) for n in range(3)),
        put(uri, "a", [3], failed=[3]),
        put(uri, "b", [0], **row("b/0.jpg")),
        put(uri, "a", [0], version="v0", **row("a/stale.jpg")),
        put(uri, "c", [0], model="other", **row("c/0.jpg")),
    ]
    table.commit(files)
    taxonomy = load_taxonomy("scenes").describe()
    models = [{"label": label, "version": "v1", "task": "semantic", "taxonomy": taxonomy} for label in ("m", "other")]
    (tmp_path / "run.json").write_text(json.dumps({"models": models}))
    return uri


def predictions(uri: str, limit: int | None = None, **options: Any) -> TablePredictions:
    source = FilesSource(format="files", uri="x", limit=limit)
    return TablePredictions(PredictionsConfig(uri=uri, **options), source)


def unit(shard_id: str, stop: int | None = None) -> Unit:
    return Unit(shard_id=shard_id, location=f"/{shard_id}", size_bytes=1, fingerprint="f", payload=b"own", stop=stop)


def opened(source: TablePredictions, *units: Unit, model: str = "m") -> dict[str, UnitPredictions]:
    """By shard, as workers see them: through pickle."""
    plan = source.prepare(plan_table(units))
    there = pickle.loads(pickle.dumps(source))
    found = {}
    for entry in plan.to_pylist():
        own, payload = split_payload(entry["payload"])
        assert own == (b"own" if entry["location"] else b"")
        found[entry["shard_id"]] = there.open_unit(row_to_unit(entry | {"payload": own}), payload, model)
    return found


def find(own: UnitPredictions, image_id: str) -> Found | None:
    return own.find(Sample(image_id=image_id, shard_id="s", position=0, image=b""))


def test_by_shard(uri: str) -> None:
    source = predictions(uri)
    assert [(model.label, model.version) for model in source.models()] == [("m", "v1"), ("other", "v1")]
    shards = opened(source, unit("a"), unit("b"))
    assert list(shards) == ["a", "b", "c"]  # c has predictions and no target
    found = find(shards["a"], "a/1.jpg")
    assert found is not None
    assert (found.name, found.width, found.height) == ("a/1.jpg", 12, 20)
    assert found.predicted is not None
    assert np.array_equal(found.predicted.label_HW, LABEL_HW)  # type: ignore[arg-type]
    assert find(shards["a"], "a/stale.jpg") is None
    assert find(shards["a"], "b/0.jpg") is None
    failed = find(shards["a"], "a/3")
    assert failed is not None
    assert (type(failed.error), str(failed.error), failed.error_stage) == (CorruptImageError, "bad 3", "decode")
    assert {item.name for item in shards["a"].unused()} == {"a/0.jpg", "a/2.jpg"}
    assert source.names("m") is None
    other = opened(source, unit("a"), unit("b"), model="other")
    assert [item.name for item in other["c"].unused()] == ["c/0.jpg"]
    assert [*other["a"].unused()] == []


def test_a_limit_asks_for_no_more(uri: str) -> None:
    shards = opened(predictions(uri, limit=2), unit("a", stop=2))
    assert list(shards) == ["a"]
    assert {item.name for item in shards["a"].unused()} == {"a/0.jpg", "a/1.jpg"}


def test_a_units_fingerprint_changes_with_its_predictions_alone(uri: str) -> None:
    def marks() -> list[str]:
        plan = predictions(uri).prepare(plan_table([unit("a"), unit("b")]))
        return plan.column("fingerprint").to_pylist()[:2]

    before = marks()
    assert before == marks()
    table = RowTable.open(uri, {})
    table.take_over()
    table.commit([put(uri, "b", [1], **row("b/1.jpg"))])
    after = marks()
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_by_name_where_the_shards_are_others(uri: str) -> None:
    source = predictions(uri, match="name", models=("other",))
    (own,) = opened(source, unit("elsewhere"), model="other").values()
    found = find(own, "annotations/0.png")
    assert found is not None
    assert found.name == "c/0.jpg"
    assert find(own, "annotations/7.png") is None
    names = source.names("other")
    assert names is not None
    assert names.to_pylist() == ["c/0.jpg"]
    assert [*own.unused()] == []


def test_by_id_where_the_shards_are_others(uri: str) -> None:
    (own,) = opened(predictions(uri, models=("m",)), unit("elsewhere")).values()
    assert find(own, "a/2.jpg") is not None
    assert find(own, "a/stale.jpg") is None


def test_what_cannot_be_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"'nobody'; it has m, other"):
        predictions(uri, models=("nobody",)).models()
    with pytest.raises(ConfigError, match="share the same file name"):  # a/0.jpg and b/0.jpg
        predictions(uri, match="name").prepare(plan_table([unit("elsewhere")]))
    table = RowTable.open(uri, {})
    table.take_over()
    table.commit([put(uri, "d", [0], **row("a/1.jpg"))])
    with pytest.raises(ConfigError, match="share the same image_id"):
        predictions(uri).prepare(plan_table([unit("elsewhere")]))


def test_a_mask_that_is_none_costs_its_row(uri: str) -> None:
    table = RowTable.open(uri, {})
    table.take_over()
    table.commit([put(uri, "b", [1], **row("b/1.jpg") | {"semantic": {"format": "png", "data": b"no"}})])
    found = find(opened(predictions(uri), unit("b"))["b"], "b/1.jpg")
    assert found is not None
    assert (type(found.error), found.error_stage) == (PredictError, "decode")
