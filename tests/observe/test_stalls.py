"""Stall attribution on made-up timings: the rule of docs/observability.md, its limits and its words."""

import pytest

from pipeline.observe.stalls import ADVICE, BOUNDS, METRIC_STAGES, WAITED_FOR, attribute, metric_seconds
from pipeline.stages.waits import CAUSES
from pipeline.stages.work import STAGES


def test_every_cause_and_stage_has_its_words() -> None:
    assert set(BOUNDS) == set(CAUSES)
    assert set(WAITED_FOR) == set(BOUNDS.values())
    assert set(ADVICE) == {*WAITED_FOR, "accelerator"}
    assert sorted(stage for stages in METRIC_STAGES.values() for stage in stages) == sorted(STAGES)


@pytest.mark.parametrize(
    ("busy", "waits", "bound"),
    [
        (0.0, {}, "start-up"),
        (10.0, {}, "accelerator"),
        (80.0, {"read": 20.0}, "accelerator"),
        (79.0, {"read": 21.0}, "reader"),
        (79.0, {"read": 10.0, "decode": 11.0}, "decoder"),
        (30.0, {"read": 5.0, "decode": 5.0, "encode": 50.0, "write": 10.0}, "encoder"),
        (0.0, {"write": 1.0}, "writer"),
        (50.0, {"dispatch": 30.0, "read": 20.0}, "dispatch"),
        (50.0, {"other": 50.0}, "host"),
    ],
)
def test_bound(busy: float, waits: dict[str, float], bound: str) -> None:
    stalls = attribute({"predict": busy, "read": 1e9, "decode": 1e9}, waits)
    assert stalls.bound == bound
    if bound != "start-up":
        assert stalls.busy_share + sum(stalls.waits.values()) == pytest.approx(1)
        assert stalls.sentence.startswith(f"{bound}-bound: ")
        assert ADVICE[bound] in stalls.sentence
    # Only shares count: neither workers nor hours.
    again = attribute({"predict": busy * 60}, {cause: 60 * seconds for cause, seconds in waits.items()})
    assert again == stalls


def test_sentences() -> None:
    assert attribute({"predict": 31.0}, {"read": 62.0, "write": 7.0}).sentence == (
        "reader-bound: the accelerator was busy 31% of the time and waited 62% for bytes from the source: more units "
        "at once (resources.calls_per_worker), or workers nearer to the source would help"
    )
    assert attribute({"predict": 9.0}, {"read": 1.0}).sentence == (
        "accelerator-bound: it was busy 90% of the time: more or faster accelerators, lower precision or a smaller "
        "model would help"
    )


def test_in_the_split_layout_a_wait_for_windows_is_one_for_those_who_make_them() -> None:
    seconds = {"predict": 10.0, "read": 3.0, "decode": 8.0, "prepare": 1.0}
    stalls = attribute(seconds, {"dispatch": 40.0, "write": 50.0}, layout="split")
    assert stalls.bound == "writer"
    assert stalls.waits == pytest.approx({"writer": 0.5, "reader": 0.1, "decoder": 0.3})
    stalls = attribute(seconds, {"dispatch": 40.0}, layout="split")
    assert stalls.bound == "decoder"
    assert "resources.readers" in stalls.sentence
    assert attribute(seconds, {"dispatch": 40.0}).bound == "dispatch"
    assert attribute({"predict": 1.0}, {"dispatch": 40.0}, layout="split").bound == "dispatch"  # nobody has read


def test_as_json() -> None:
    stalls = attribute({"predict": 1.0}, {"read": 2.0})
    assert stalls.as_json() == {
        "bound": "reader",
        "busy_share": 0.3333,
        "waits": {"reader": 0.6667},
        "sentence": stalls.sentence,
    }


def test_seconds_of_the_metric() -> None:
    seconds = {"read": 1.0, "decode": 2.0, "prepare": 4.0, "predict": 8.0, "encode": 16.0, "score": 32.0, "write": 64.0}
    assert metric_seconds(seconds, {"read": 0.5, "write": 0.25}) == {
        "read": 1.0, "decode": 6.0, "predict": 8.0, "encode": 48.0, "write": 64.0, "wait": 0.75,
    }  # fmt: skip
