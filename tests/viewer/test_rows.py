"""Pages of rows: any cut of a table into files gives the same rows, in order, once each, for every question."""

import itertools
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_endpoint import S3
from viewer_helpers import make_row, samples, write_rows, write_run, write_table

from pipeline.compaction import compact
from pipeline.errors import ConfigError, SchemaError
from pipeline.masks import decode_label_map
from pipeline.table import RowTable
from pipeline.viewer import scan
from pipeline.viewer.query import SORTS, START, Key, parse_query
from pipeline.viewer.ranking import Rankings
from pipeline.viewer.scan import Stop, find_page
from pipeline.viewer.stored import Snapshot, Stored
from pipeline.viewer.viewer import MissingError, Viewer

VERSIONS: dict[str, str | None] = {"maps": "v1", "objects": "v1", "near": "v1"}
QUESTIONS: list[dict[str, str]] = [
    {},
    {"model": "maps"},
    {"model": "objects", "class": "2"},
    {"model": "objects", "class": "1", "score_min": "0.3", "score_max": "0.8"},
    {"score_min": "0.9"},
    {"class": "1"},
    {"model": "maps", "class": "3"},
    {"class": "77"},
    {"status": "failed"},
    {"status": "ok", "conf_min": "0.25", "conf_max": "0.75"},
    {"shard": "#5"},
    {"text": "/00000"},
    {"text": "nowhere"},
    {"model": "maps@old"},
]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as opened:
        yield opened


def expected(rows: list[tuple[str, dict[str, Any]]], words: dict[str, str]) -> list[Key]:
    """What a question comes to, looked up row by row."""
    found = []
    for model, row in rows:
        segments, semantic = row.get("segments"), row.get("semantic")
        scored = "score_min" in words or "score_max" in words
        low, high = float(words.get("score_min", 0)), float(words.get("score_max", 1))
        wanted = [s for s in segments or () if low <= s["score"] <= high]
        has_class = True
        if "class" in words:
            wanted = [s for s in wanted if s["category_id"] == int(words["class"])]
            has_class = bool(wanted)
            if segments is None and semantic and not scored:
                label_HW = decode_label_map(semantic["data"], "png", width=64, height=48)
                has_class = bool((label_HW == int(words["class"])).any())
        elif scored:
            has_class = bool(wanted)
        confidence = (row.get("quality") or {}).get("mean_max_probability", np.nan)
        name, _, version = words.get("model", "").partition("@")
        fits = (
            (not name or model == name)
            and row["model_version"] == (version or "v1")
            and (not words.get("status") or row["status"] == words["status"])
            and ("conf_min" not in words or confidence >= float(words["conf_min"]))
            and ("conf_max" not in words or confidence <= float(words["conf_max"]))
            and words.get("shard", "") in row["shard_id"]
            and words.get("text", "") in row["image_id"]
            and has_class
        )
        if fits:
            found.append(Key(row["shard_id"], row["position"], model))
    return sorted(found)


def pages(uri: Path, words: dict[str, str], pool: ThreadPoolExecutor, count: int, seconds: float | None) -> list[Key]:
    """Every page of a question, one after the other."""
    snapshot, stored = Snapshot(RowTable.open(str(uri), {})), Stored(str(uri), {})
    query = parse_query(words, VERSIONS)
    found: list[Key] = []
    start: Key | None = START
    for _ in range(10_000):
        if start is None:
            return found
        page = find_page(snapshot, stored, pool, query, start, count, Stop(seconds))
        assert len(page.rows) <= count
        assert 0 <= page.searched <= page.total
        assert page.following is None or page.following > start or page.rows, "it gets no further"
        found += [Key(row["shard_id"], row["position"], row["model"]) for row in page.rows]
        start = page.following
    raise AssertionError("the pages have no end")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, dict[str, Any]]]]:
    uri = tmp_path_factory.mktemp("rows") / "labels"
    written = write_table(uri)
    older = [("maps", {**row, "model_version": "old"}) for model, row in written if model == "maps"][:5]
    write_rows(uri, older)
    return uri, [*written, *older]


@pytest.mark.parametrize("words", QUESTIONS, ids=lambda words: "&".join(f"{k}={v}" for k, v in words.items()) or "all")
def test_pages_are_what_a_look_at_every_row_gives(
    words: dict[str, str], rows: tuple[Path, list[tuple[str, dict[str, Any]]]], pool: ThreadPoolExecutor
) -> None:
    uri, written = rows
    wanted = expected(written, words)
    assert pages(uri, words, pool, 4, None) == wanted
    # A search that has no time comes to the same, in more pieces.
    assert pages(uri, words, pool, 100, 0.0) == wanted
    if words in ({}, {"class": "1"}):
        assert wanted


def test_compacted_and_cut_elsewhere(
    tmp_path: Path, rows: tuple[Path, Any], pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tablefiles.GROUP_ROWS", 8)  # many row groups in one file
    monkeypatch.setattr(scan, "FILES_AT_ONCE", 2)
    for rows_per_file in (1, 7):
        uri = tmp_path / str(rows_per_file)
        written = write_table(uri, seed=rows_per_file, rows_per_file=rows_per_file)
        for step in ("written", "compacted"):
            if step == "compacted":
                compact(str(uri), {}, keep_hours=0)
                assert len(RowTable.open(str(uri), {}).files()) == 3
            for words in ({}, {"class": "1"}, {"status": "failed"}, {"conf_min": "0.5", "model": "near"}):
                assert pages(uri, words, pool, 5, None) == expected(written, words), (rows_per_file, step, words)


def test_a_first_page_opens_few_files(rows: tuple[Path, Any], pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    # In order, as workers write them: a unit a file.
    uri = tmp_path / "labels"
    many = [
        ("maps", {**make_row(samples()[0], "maps", 1), "shard_id": f"s{unit:03}", "position": position})
        for unit in range(40)
        for position in range(4)
    ]
    write_rows(uri, many, rows_per_file=4)
    write_run(uri, ["maps"])
    opened: list[str] = []

    class Counting(Stored):
        def open(self, path: str) -> Any:
            opened.append(path)
            return super().open(path)

    snapshot, query = Snapshot(RowTable.open(str(uri), {})), parse_query({"model": "maps"}, {"maps": "v1"})
    page = find_page(snapshot, Counting(str(uri), {}), pool, query, START, 4, Stop(None))
    assert [row["shard_id"] for row in page.rows] == ["s000"] * 4
    assert page.following == Key("s001", 0, "maps")
    assert len(opened) <= 7  # two, and what was read ahead of them
    opened.clear()
    late = find_page(snapshot, Counting(str(uri), {}), pool, query, Key("s038", 2, "maps"), 4, Stop(None))
    assert [(row["shard_id"], row["position"]) for row in late.rows] == [
        ("s038", 2),
        ("s038", 3),
        ("s039", 0),
        ("s039", 1),
    ]
    assert len(opened) == 2
    opened.clear()
    only = parse_query({"shard": "s017"}, {"maps": "v1"})
    assert len(find_page(snapshot, Counting(str(uri), {}), pool, only, START, 48, Stop(None)).rows) == 4
    assert len(opened) == 1
    opened.clear()
    failed = parse_query({"status": "failed"}, {"maps": "v1"})
    assert find_page(snapshot, Counting(str(uri), {}), pool, failed, START, 48, Stop(None)).rows == []
    assert opened == []  # the log says that none failed


@pytest.mark.parametrize("sort", ["confidence", "-confidence", "objects", "-objects"])
def test_sorted_pages(sort: str, rows: tuple[Path, Any], pool: ThreadPoolExecutor) -> None:
    uri, written = rows
    model = "objects" if "objects" in sort else "near"
    snapshot, stored = Snapshot(RowTable.open(str(uri), {})), Stored(str(uri), {})
    rankings = Rankings(pool)
    query = parse_query({"model": model, "sort": sort}, VERSIONS)
    ranking = rankings.get(snapshot, stored, query)
    assert ranking.done.wait(30)
    assert ranking.error is None
    assert rankings.get(snapshot, stored, query) is ranking
    own = [row for name, row in written if name == model and row["model_version"] == "v1"]
    values = {
        (row["shard_id"], row["position"]): len(row["segments"])
        if "objects" in sort
        else float(row["quality"]["mean_max_probability"])
        for row in own
        if row["status"] == "ok"
    }
    found = [row for start in range(0, 20, 5) for row in ranking.rows(snapshot, stored, start, 5)]
    keys = [(row["shard_id"], row["position"]) for row in found]
    assert sorted(keys) == sorted(values)
    in_order = [values[key] for key in keys]
    assert in_order == sorted(in_order, reverse=sort.startswith("-"))
    assert ranking.unranked == len(own) - len(values)
    rankings.close()


def test_a_ranking_keeps_a_bounded_number_of_rows(
    rows: tuple[Path, Any], pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, written = rows
    monkeypatch.setattr("pipeline.viewer.ranking.MOST_RANKED", 3)
    snapshot, stored = Snapshot(RowTable.open(str(uri), {})), Stored(str(uri), {})
    rankings = Rankings(pool)
    ranking = rankings.get(snapshot, stored, parse_query({"sort": "confidence"}, VERSIONS))
    assert ranking.done.wait(30)
    values = sorted(
        float(row["quality"]["mean_max_probability"])
        for _, row in written
        if row["status"] == "ok" and row["model_version"] == "v1"
    )
    assert ranking.cut
    assert ranking.places["value"].tolist() == pytest.approx(values[:3])
    rankings.close()


def test_a_ranking_gives_way_to_another(rows: tuple[Path, Any], pool: ThreadPoolExecutor) -> None:
    uri, _ = rows
    snapshot = Snapshot(RowTable.open(str(uri), {}))
    rankings = Rankings(pool)
    first, second = (
        rankings.get(snapshot, Stored(str(uri), {}), parse_query({"sort": sort}, VERSIONS))
        for sort in ("confidence", "-confidence")
    )
    assert first.done.wait(30)
    assert second.done.wait(30)
    assert first.stop.cancelled or len(first.places)
    assert not second.stop.cancelled
    rankings.close()


WRONG = [
    {"model": "nobody"}, {"status": "maybe"}, {"sort": "image_id"}, {"class": "-1"}, {"class": "70000"}, {"class": "²"},
    {"class": "1" * 5000}, {"score_min": "nan"}, {"conf_max": "much"}, {"conf_min": "inf"}, {"text": "x" * 501},
]  # fmt: skip


@pytest.mark.parametrize("words", WRONG, ids=str)
def test_questions_that_are_none(words: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(words))):
        parse_query(words, VERSIONS)


def test_questions_are_equal_where_they_ask_the_same() -> None:
    asked = [
        {},
        *({name: "1"} for name in ("class", "score_min", "score_max", "conf_min", "conf_max", "shard", "text")),
    ]
    asked += [{"status": "ok"}, {"model": "maps"}, *({"sort": sort} for sort in SORTS[1:])]
    keys = [parse_query(words, VERSIONS).key for words in asked]
    assert len(set(keys)) == len(asked)
    assert parse_query({"sort": "order"}, VERSIONS).key == parse_query({}, VERSIONS).key
    for one, other in itertools.pairwise(keys):
        assert hash(one) is not None
        assert one != other


@pytest.mark.parametrize("path", ["../../etc/x.parquet", "/etc/x.parquet", "model=m/../../x", "s3://b/x.parquet"])
def test_a_log_that_names_files_elsewhere_is_refused(path: str, tmp_path: Path) -> None:
    write_table(tmp_path)
    log = sorted((tmp_path / "_delta_log").glob("*.json"))[-1]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if "add" in line:
            line["add"]["path"] = path
            break
    log.write_text("\n".join(map(json.dumps, lines)) + "\n")
    with pytest.raises(SchemaError, match="outside"):
        Snapshot(RowTable.open(str(tmp_path), {}))


def test_rows_of_random_keys_come_in_order(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """Files whose ranges lie over each other, shards that begin alike, equal keys of two models."""
    draw = random.Random(5)
    base = {"image_id": "i", "model_version": "v1", "status": "ok", "width": 8, "height": 8, "run_id": "r"}
    keys = {(draw.choice(["a", "a#1", "aa", "b", "ü", "\U0001f600"]), draw.randrange(30)) for _ in range(30)}
    rows = [(model, {**base, "shard_id": s, "position": p}) for model in ("maps", "near") for s, p in keys]
    draw.shuffle(rows)
    write_rows(tmp_path, rows, rows_per_file=4)
    wanted = sorted(Key(row["shard_id"], row["position"], model) for model, row in rows)
    for count in (3, 100):
        assert pages(tmp_path, {}, pool, count, None) == wanted


def test_a_table_in_object_storage(s3: S3) -> None:
    uri = f"s3://{s3.bucket('viewer')}/labels"
    written = [(model, make_row(sample, model, 3)) for model in ("maps", "objects") for sample in samples()]
    write_rows(uri, written, storage=s3.options)
    viewer = Viewer(uri, s3.options)
    found = viewer.rows({"count": "100"}, Stop(None))
    assert [(row["shard"], row["position"], row["model"]) for row in found["rows"]] == expected(written, {})
    shown = viewer.rows({"model": "maps", "status": "ok"}, Stop(None))["rows"][0]
    words = {name: str(shown[name]) for name in ("model", "version", "shard", "position")}
    assert len(viewer.pixels(words)) > 2 * 64 * 48
    with pytest.raises(MissingError, match=r"run\.json"):
        viewer.image(words)
    viewer.close()
