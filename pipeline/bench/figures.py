"""What runs came to, and the medians of several that took turns."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["DECODE", "LIMIT", "OURS", "Arm", "Cell", "Figures", "Row", "Run", "rows_of", "turns"]

# The arms that the others are held against.
LIMIT, DECODE, OURS = "limit", "decode", "maskmill"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of one arm. wall_s: of the whole command, its start-up and its end too. first_row_s: until the first rows
    could be read. images_per_s: from the first batch at the model to the last row. None: has no such thing.

    problem: why there are none of these.
    """

    arm: str
    wall_s: float | None = None
    first_row_s: float | None = None
    images_per_s: float | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Medians of an arm's runs, and the lowest and highest rate."""

    wall_s: float | None
    first_row_s: float | None
    images_per_s: float | None
    lowest: float | None
    highest: float | None
    runs: int


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What took part. leaves_out: of the work, in words. agreement: with maskmill's rows, None where there are no rows.

    problem: why it did not take part, or did not end.
    """

    name: str
    figures: Figures | None = None
    leaves_out: str = ""
    agreement: Mapping[str, Any] | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One corpus and model, and what every arm made of it."""

    name: str
    corpus: str
    model: str
    task: str
    images: int
    size_bytes: int
    arms: tuple[Arm, ...] = ()
    runs: tuple[Run, ...] = field(default=(), repr=False)

    def arm(self, name: str) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    def plain(self) -> dict[str, Any]:
        """JSON's values, with what the rows of the table say."""
        return {**asdict(self), "rows": [asdict(row) for row in rows_of(self)]}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. of_limit: its rate as a share of the limit's,
    the slower of forward passes and decoding. rate_to_ours, wall_to_ours: how many times
    as fast as maskmill it is, in images/s and by the whole command. ahead: in which of rate, wall and first row."""

    name: str
    images_per_s: float | None = None
    of_limit: float | None = None
    rate_to_ours: float | None = None
    wall_s: float | None = None
    wall_to_ours: float | None = None
    first_row_s: float | None = None
    ahead: tuple[str, ...] = ()


def turns(arms: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """A B C A B C: whatever else the machine does for a while meets all of them."""
    for number in range(rounds):
        for arm in arms:
            yield number, arm


def medians(runs: Sequence[Run]) -> Figures | None:
    """Of the runs of one arm that ended; None where none did."""
    ended = [run for run in runs if not run.problem]
    if not ended:
        return None
    rates = [run.images_per_s for run in ended if run.images_per_s is not None]
    return Figures(
        wall_s=_median([run.wall_s for run in ended]),
        first_row_s=_median([run.first_row_s for run in ended]),
        images_per_s=_median(rates),
        lowest=min(rates, default=None),
        highest=max(rates, default=None),
        runs=len(ended),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def rows_of(cell: Cell) -> list[Row]:
    """The table of a cell, in the order of its arms, those left out that have no figures."""
    nothing = Figures(wall_s=None, first_row_s=None, images_per_s=None, lowest=None, highest=None, runs=0)
    ours, *limits = ((arm.figures if arm else None) or nothing for arm in map(cell.arm, (OURS, LIMIT, DECODE)))
    limit = min((figures.images_per_s for figures in limits if figures.images_per_s is not None), default=None)
    rows = []
    for arm in cell.arms:
        found = arm.figures
        if found is None:
            continue
        rate = _ratio(found.images_per_s, ours.images_per_s)
        wall = _ratio(ours.wall_s, found.wall_s)
        first = _ratio(ours.first_row_s, found.first_row_s)
        peer = found.wall_s is not None and arm.name != OURS
        ratios = (("images/s", rate), ("whole command", wall), ("first row", first))
        rows.append(
            Row(
                name=arm.name,
                images_per_s=found.images_per_s,
                of_limit=_ratio(found.images_per_s, limit),
                rate_to_ours=rate,
                wall_s=found.wall_s,
                wall_to_ours=wall,
                first_row_s=found.first_row_s,
                ahead=tuple(name for name, ratio in ratios if peer and ratio is not None and ratio > 1),
            )
        )
    return rows


def _ratio(value: float | None, of: float | None) -> float | None:
    if value is None or not of or not math.isfinite(value):
        return None
    return value / of


def arms_of(
    names: Sequence[str],
    runs: Sequence[Run],
    leaves_out: Mapping[str, str],
    agreements: Mapping[str, Mapping[str, Any]],
) -> tuple[Arm, ...]:
    """Each arm of `names` with the medians of its runs, or with the problem of the first that failed."""
    arms = []
    for name in names:
        own = [run for run in runs if run.arm == name]
        problems = [run.problem for run in own if run.problem]
        arms.append(
            Arm(
                name=name,
                figures=medians(own),
                leaves_out=leaves_out.get(name, ""),
                agreement=agreements.get(name),
                problem=problems[0] if problems else "",
            )
        )
    return tuple(arms)
