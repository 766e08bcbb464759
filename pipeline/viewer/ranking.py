"""Rows in the order of a value: one pass over the columns that it needs, made in the background and kept as numbers.

A ranking holds 20 bytes a row, and of more than MOST_RANKED rows only the first ones, so a table of any size fits.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.viewer.query import START, Query
from pipeline.viewer.scan import MapClasses, Stop, groups_of, matching, read_shown
from pipeline.viewer.stored import Place, Snapshot, Stored

__all__ = ["Ranking", "Rankings"]

MOST_RANKED = 2_000_000
KEPT = 4
AHEAD = 16
# A ranking that nobody has asked for so long is given up.
PATIENCE_S = 20.0

PLACE = np.dtype([("value", np.float64), ("file", np.int32), ("group", np.int32), ("row", np.int32)])
Places = npt.NDArray[Any]


@dataclass
class Ranking:
    """places: by value, then as stored. unranked: rows that fit and have no such value. cut: whether there are more
    rows than are ranked."""

    total: int = 0
    searched: int = 0
    places: Places = field(default_factory=lambda: np.empty(0, PLACE))
    unranked: int = 0
    cut: bool = False
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)
    stop: Stop = field(default_factory=Stop)

    def rows(self, snapshot: Snapshot, stored: Stored, start: int, count: int) -> list[dict[str, Any]]:
        """SHOWN of the rows at these places, each with the `value` that orders it."""
        wanted = self.places[start : start + count]
        shown: dict[Place, dict[str, Any]] = {}
        pairs = np.unique(wanted[["file", "group"]])
        for number, group in pairs.tolist():
            file = snapshot[number]
            own = wanted[(wanted["file"] == number) & (wanted["group"] == group)]["row"].tolist()
            with stored.open(file.path) as opened:
                for row in read_shown(opened, number, group, own, file.model):
                    shown[row["place"]] = row
        return [{**shown[Place(number, group, row)], "value": value} for value, number, group, row in wanted.tolist()]


class Rankings:
    """The last rankings of one snapshot that were asked for. At most one is being made."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._kept: OrderedDict[tuple[Any, ...], Ranking] = OrderedDict()
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def get(self, snapshot: Snapshot, stored: Stored, query: Query) -> Ranking:
        """The ranking of a query, perhaps still being made: wait for `done`. What is made for another is given up."""
        key = query.key
        with self._lock:
            self._wait_for_readers()
            ranking = self._kept.get(key)
            if ranking is not None and not ranking.stop.cancelled:
                self._kept.move_to_end(key)
                return ranking
            self._cancel_unfinished()
            ranking = self._kept[key] = Ranking()
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)[1].stop.cancel()
            thread = threading.Thread(target=_make, args=(ranking, snapshot, stored, query, self._pool), daemon=True)
            thread.start()
        return ranking

    def close(self) -> None:
        """Give up what is being made."""
        with self._lock:
            self._cancel_unfinished()
            if self._timer is not None:
                self._timer.cancel()

    def _wait_for_readers(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(PATIENCE_S, self.close)
        self._timer.daemon = True
        self._timer.start()

    def _cancel_unfinished(self) -> None:
        for ranking in self._kept.values():
            if not ranking.done.is_set():
                ranking.stop.cancel()


def _make(ranking: Ranking, snapshot: Snapshot, stored: Stored, query: Query, pool: ThreadPoolExecutor) -> None:
    try:
        numbers, ranking.total = snapshot.select(query, START)
        ranking.searched = ranking.total - snapshot.rows_of(numbers)
        found: list[Places] = []
        waiting: list[tuple[int, Future[tuple[Places, int]]]] = []
        held = 0

        def take() -> None:
            nonlocal held
            rows, future = waiting.pop(0)
            places, unranked = future.result()
            found.append(places)
            held += len(places)
            ranking.unranked += unranked
            ranking.searched += rows
            if held > 2 * MOST_RANKED:
                found[:] = [_first(found, MOST_RANKED)]
                held, ranking.cut = len(found[0]), True

        for number, _, rows in snapshot.firsts(numbers):
            if ranking.stop.cancelled:
                break
            waiting.append((rows, pool.submit(_values, snapshot, stored, query, number, ranking.stop)))
            if len(waiting) > AHEAD:
                take()
        while waiting and not ranking.stop.cancelled:
            take()
        ranking.cut = ranking.cut or held > MOST_RANKED
        ranking.places = np.sort(_first(found, MOST_RANKED))
    except Exception as error:  # noqa: BLE001  (whoever waits for the ranking raises it)
        ranking.error = error
    finally:
        ranking.done.set()


def _values(snapshot: Snapshot, stored: Stored, query: Query, number: int, stop: Stop) -> tuple[Places, int]:
    """Value and place of each row of a file that fits, and how many rows that fit have no value."""
    parts: list[Places] = []
    unranked = 0
    file = snapshot[number]
    with stored.open(file.path) as opened:
        for group, _ in groups_of(opened, query):
            if stop.cancelled:
                break
            rows = matching(opened, group, query, file.model, query.sort_columns)
            value_N = query.values(rows)
            row_N = rows.column("row").to_numpy()
            if query.asks_maps and len(rows):
                keep_N = _keep(opened, group, query, rows, row_N.tolist(), stop)
                value_N, row_N = value_N[keep_N], row_N[keep_N]
            known_N = ~np.isnan(value_N)
            unranked += int((~known_N).sum())
            places = np.empty(int(known_N.sum()), PLACE)
            places["value"], places["row"] = value_N[known_N], row_N[known_N]
            places["file"], places["group"] = number, group
            parts.append(places)
    return (np.concatenate(parts) if parts else np.empty(0, PLACE)), unranked


def _keep(
    opened: Any, group: int, query: Query, rows: Any, numbers: Sequence[int], stop: Stop
) -> npt.NDArray[np.bool_]:
    """Which rows have the class in their segments or label map."""
    lacks_N = rows.column("segments").combine_chunks().is_null().to_numpy(zero_copy_only=False)
    wanted = {number for number, lacks in zip(numbers, lacks_N, strict=True) if lacks}
    maps = MapClasses(opened, group, wanted, query.class_id or 0)
    return np.array(
        [
            not lacks or (not stop.cancelled and maps.has(number))
            for number, lacks in zip(numbers, lacks_N, strict=True)
        ],
        bool,
    )


def _first(found: Sequence[Places], most: int) -> Places:
    """The `most` smallest."""
    whole: Places = np.concatenate(found) if found else np.empty(0, PLACE)
    if len(whole) > most:
        whole = whole[np.argpartition(whole["value"], most - 1)[:most]]
    return whole
