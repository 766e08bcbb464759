"""What of a corpus is looked at, and what that says of the whole: counts, sizes, failures, cut shards."""

import random
from pathlib import Path

import pytest
from preflight_helpers import jpeg, shards

from pipeline.config import ScenesSource, SourceConfig
from pipeline.preflight.sampling import Corpus, choose, choose_units, describe_plan
from pipeline.preflight.survey import SourceFindings, Survey, source_findings, survey
from pipeline.sources.base import Unit
from pipeline.sources.registry import open_source
from pipeline.units import plan_table


def look(config: SourceConfig, *, units: int = 8, images: int = 64, seed: int = 0) -> tuple[SourceFindings, Survey]:
    source = open_source(config)
    plan = plan_table(source.plan())
    corpus = describe_plan(plan, config.limit)
    parts = [choose(source, unit, images, seed) for unit in choose_units(plan, units, seed)]
    found = survey(source, config, parts, [], [])
    return source_findings(corpus, found), found


def test_units_come_from_all_over_the_plan_and_from_the_seed_alone() -> None:
    plan = plan_table(Unit(shard_id=f"{n:04}", location="", size_bytes=1, fingerprint="") for n in range(1000))
    chosen = [int(unit.shard_id) for unit in choose_units(plan, 10, 3)]
    assert [number // 100 for number in chosen] == list(range(10))
    assert chosen == [int(unit.shard_id) for unit in choose_units(plan, 10, 3)]
    assert chosen != [int(unit.shard_id) for unit in choose_units(plan, 10, 4)]
    assert chosen != list(range(0, 1000, 100))
    assert len(choose_units(plan.slice(0, 4), 10, 0)) == 4


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_the_interval_contains_the_share_of_corrupt_images(tmp_path: Path, share: float) -> None:
    draw, good = random.Random(11), jpeg()
    contents = [[good if draw.random() >= share else good[:200] for _ in range(40)] for _ in range(30)]
    truth = sum(data != good for images in contents for data in images) / 1200
    found, _ = look(shards(tmp_path, contents), units=10, images=20)
    assert found.looked_at == 200
    assert found.failed_share.low <= truth <= found.failed_share.high
    assert found.failed_share.high - found.failed_share.low < 0.35
    assert [failure.kind for failure in found.failures] == (["CorruptImageError"] if share else [])
    if share:
        (failure,) = found.failures
        assert failure.stage == "decode"
        assert failure.images == round(found.failed_share.value * 200)
        assert len(failure.examples) == 3
        assert failure.examples[0].split("/")[0].endswith(".tar")


def test_images_of_shards_are_estimated_by_their_bytes_and_counted_when_all_are_seen(tmp_path: Path) -> None:
    draw = random.Random(5)
    contents = [[jpeg(seed=draw.randrange(10))] * draw.randrange(10, 60) for _ in range(30)]
    truth = sum(map(len, contents))
    config = shards(tmp_path, contents)
    some, _ = look(config, units=6)
    assert not some.images.exact
    assert some.images.low <= truth <= some.images.high
    assert some.images.value == pytest.approx(truth, rel=0.1)
    every, _ = look(config, units=30, images=5)
    assert (every.images.value, every.images.exact, every.whole) == (truth, True, False)
    assert every.size_bytes is not None
    assert every.size_bytes.value == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_of_a_large_archive_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.preflight.sampling.COUNTED_BYTES", 1000)
    found, detail = look(shards(tmp_path, [[jpeg()] * 200] * 3), units=3, images=20)
    assert [unit.images for unit in detail.units] == [20, 20, 20]
    assert [unit.rows for unit in detail.units] == [None, None, None]
    assert not found.images.exact
    assert found.images.value == pytest.approx(600, rel=0.03)  # tar fills its end up


def test_a_limit_and_stated_rows_are_exact() -> None:
    scenes = ScenesSource(format="scenes", count=500, unit_images=50, width=32, height=24)
    found, _ = look(scenes, units=4, images=6)
    assert (found.images.value, found.images.exact, found.units, found.looked_at) == (500, True, 10, 24)
    limited, _ = look(scenes.model_copy(update={"limit": 120}), units=3, images=6)
    assert (limited.images.value, limited.units) == (120, 3)
    assert found.targets_share == 1.0
    assert found.median_size == found.largest_size == (32, 24)


def test_a_cut_shard_is_found_wherever_it_is_cut(tmp_path: Path) -> None:
    config = shards(tmp_path, [[jpeg()] * 60 for _ in range(4)])
    path = tmp_path / "s-002.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found, detail = look(config, units=4, images=3, seed=1)
    ((shard_id, text),) = found.cut
    assert shard_id == "s-002.tar"
    assert "s-002.tar" in text
    # What was looked at for the end alone is no part of the sample.
    assert sum(unit.images for unit in detail.units) == 12


def test_too_large_images_are_counted_with_their_sizes_unread(tmp_path: Path) -> None:
    config = shards(tmp_path, [[jpeg(400, 300), jpeg(), jpeg(20, 10), jpeg()]])
    found, _ = look(config.model_copy(update={"max_pixels": 50_000}))
    assert [(failure.kind, failure.images) for failure in found.failures] == [("ImageTooLargeError", 1)]
    assert found.failed_share.value == 0.25
    assert found.failed_share.exact
    assert (found.median_size, found.largest_size) == ((40, 30), (40, 30))
    assert found.median_bytes is not None
    assert found.mean_bytes is not None
    assert found.mean_bytes > found.median_bytes
    assert found.decode_s is not None
    assert found.decode_s > 0


def test_nothing_looked_at_is_said_as_such() -> None:
    corpus = Corpus(units=3, size_bytes=None, rows=0, unstated=3, unstated_bytes=0, limit=None)
    found = source_findings(corpus, Survey())
    assert found.looked_at == 0
    assert found.median_size is None
    assert (found.failed_share.low, found.failed_share.high) == (0.0, 1.0)
