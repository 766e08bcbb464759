"""Progress: shares by hand, durations as people say them, plain lines away from a terminal."""

import io
from typing import Any

import pytest
from rich.console import Console

from pipeline import progress
from pipeline.printable import PrintableConsole
from pipeline.progress import Reporter, counts_table, duration, progress_lines, stage_shares
from pipeline.stages.work import STAGES
from pipeline.status import Counts


def test_stage_shares() -> None:
    assert stage_shares({"read": 1.0, "decode": 3.0}) == {"read": 0.25, "decode": 0.75}
    assert stage_shares(dict.fromkeys(STAGES, 0.0)) == dict.fromkeys(STAGES, 0.0)
    assert stage_shares({}) == {}
    assert sum(stage_shares({stage: 0.1 * n for n, stage in enumerate(STAGES)}).values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (61, "1 min 01 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7265, "2 h 01 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def make_reporter(
    monkeypatch: pytest.MonkeyPatch, *, terminal: bool, **options: Any
) -> tuple[Reporter, io.StringIO, Clock]:
    clock, text = Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)

    def console(**settings: Any) -> PrintableConsole:
        return PrintableConsole(file=text, force_terminal=terminal, width=120, soft_wrap=settings["soft_wrap"])

    monkeypatch.setattr(progress, "PrintableConsole", console)
    return Reporter(**options), text, clock


def test_plain_lines_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, text, clock = make_reporter(monkeypatch, terminal=False)
    reporter.start(1000, 100)
    for _ in range(25):
        clock.now += 1
        reporter.update(done=100 + int(clock.now - 1000) * 10, total=1000, failed=3, limit="predict")
    reporter.stop()
    assert text.getvalue().splitlines() == [
        "200 / 1000 images, 10.0 img/s, failed 3, ETA 1 min 20 s, limit: predict",
        "300 / 1000 images, 10.0 img/s, failed 3, ETA 1 min 10 s, limit: predict",
    ]


def test_the_cost_stands_at_the_end_of_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, text, clock = make_reporter(monkeypatch, terminal=False)
    assert reporter.images_per_s == 0
    reporter.start(100, 0)
    clock.now += 10
    reporter.update(done=50, total=100, failed=0, limit="reader", cost="1.20 USD + 1.00 to go")
    assert text.getvalue().endswith("ETA 10 s, limit: reader  cost 1.20 USD + 1.00 to go\n")
    assert reporter.images_per_s == 5


ACCELERATOR = {"bound": "reader", "sentence": "reader-bound: ..."}
COST = {"currency": "EUR", "per_hour": 1.0, "so_far": 2.0, "per_1000_images": 0.5, "to_go": 3.0}


@pytest.mark.parametrize(
    ("progress", "lines"),
    [
        (None, []),
        ({}, []),
        ({"accelerator": ACCELERATOR}, ["reader-bound: ..."]),
        ({"accelerator": {"bound": "start-up", "sentence": "nothing yet"}, "cost": None}, []),
        (
            {"accelerator": ACCELERATOR, "cost": COST},
            ["reader-bound: ...", "cost: 2.00 EUR so far, 0.500 per 1000 images, 3.00 to go"],
        ),
        ({"accelerator": "?", "cost": {"so_far": 1}}, []),  # not ours
        ({"cost": {**COST, "so_far": "much"}}, []),
    ],
)
def test_progress_lines(progress: dict[str, Any] | None, lines: list[str]) -> None:
    assert progress_lines(progress) == lines


def test_the_rate_is_that_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, text, clock = make_reporter(monkeypatch, terminal=False)
    reporter.start(10_000, 0)
    for second in range(1, 131):
        clock.now += 1
        reporter.update(done=min(second, 30) * 100, total=10_000, failed=0, limit="read")
    lines = text.getvalue().splitlines()
    assert "100.0 img/s" in lines[2]
    assert "ETA unknown" in lines[-1]
    assert " 0.0 img/s" in lines[-1]


def test_an_estimate_that_was_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, text, clock = make_reporter(monkeypatch, terminal=False)
    reporter.start(100, 0)
    clock.now += 10
    reporter.update(done=150, total=100, failed=0, limit="read")
    assert text.getvalue() == "150 / 150 images, 15.0 img/s, failed 0, ETA 0 s, limit: read\n"


def test_text_is_said_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, text, _ = make_reporter(monkeypatch, terminal=False)
    line = "[bold]no markup[/bold] " + "x" * 300
    reporter.say(line)
    assert text.getvalue() == line + "\n"
    reporter, text, clock = make_reporter(monkeypatch, terminal=False, quiet=True)
    reporter.say(line)
    reporter.start(1, 0)
    clock.now += 99
    reporter.update(done=1, total=1, failed=0, limit="read")
    assert text.getvalue() == ""


def test_a_bar_on_a_terminal_starts_anew_with_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    reporter, text, _ = make_reporter(monkeypatch, terminal=True)
    monkeypatch.undo()
    for done in (0, 7):
        reporter.start(10, done)
        reporter.update(done=done + 1, total=10, failed=2, limit="decode")
    reporter.update(done=12, total=10, failed=2, limit="decode")
    reporter.stop()
    reporter.stop()
    assert "labelling" in text.getvalue()
    assert "12/12" in text.getvalue()
    assert "failed 2" in text.getvalue()
    assert "limit: decode" in text.getvalue()


def test_counts_table() -> None:
    text = io.StringIO()
    counts = [Counts("m", "v1", 100, 60, 3, False), Counts("n", "w1", 200, 0, 0, True)]
    Console(file=text, width=100).print(counts_table(counts))
    words = [line.split() for line in text.getvalue().splitlines()]
    assert words == [
        ["model", "version", "expected", "ok", "failed", "pending"],
        ["m", "v1", "100", "60", "3", "37"],
        ["n", "w1", "about", "200", "0", "0", "about", "200"],
    ]
