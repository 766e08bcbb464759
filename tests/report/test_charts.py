"""Charts: what is drawn where, by hand; ticks and escaping for any input."""

import math
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import Markup

from pipeline.report.charts import (
    HEIGHT,
    WIDTH,
    Axis,
    Layer,
    Point,
    Series,
    bar,
    heat_map,
    histogram,
    interval_bar,
    line_chart,
    log_axis,
    nice_axis,
    quality_map,
    share_axis,
    stack,
    swatch,
)

NOTHING = (None, math.nan, math.inf)
# What XML, by which these tests read SVG, can hold.
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"), max_size=30)


def parts(svg: Markup, kind: str) -> list[ET.Element]:
    """Elements of a class."""
    return [each for each in ET.fromstring(svg).iter() if kind in each.get("class", "").split()]


def spans(svg: Markup, kind: str) -> list[tuple[float, float]]:
    """Where rectangles of a class begin and how wide they are."""
    return [(float(each.get("x", "")), float(each.get("width", ""))) for each in parts(svg, kind)]


def said(element: ET.Element) -> str:
    return "".join(element.itertext())


def test_bars_are_as_long_as_their_values() -> None:
    assert spans(bar(0.25), "accent") == [(0, 25)]
    assert spans(bar(3, maximum=4), "accent") == [(0, 75)]
    assert spans(bar(7, maximum=4), "accent") == spans(bar(1), "accent") == [(0, 100)]
    assert spans(bar(0.25, mark=0.5), "mark") == [(49.5, 1)]
    assert spans(bar(0.5, kind="soft"), "soft") == [(0, 50)]
    for value in (0, -1, *NOTHING):
        assert spans(bar(value), "accent") == [(0, 0)]
        assert spans(bar(0.5, mark=value), "mark") in ([], [(0, 1)])
    assert bar(1, maximum=0) == bar(1, maximum=1)


def test_intervals_lie_around_their_value() -> None:
    svg = interval_bar(0.5, 0.4, 0.7, Axis(0, 1, ()), "half")
    assert spans(svg, "band") == [(80, 60)]
    assert spans(svg, "accent") == [(99, 2)]
    assert ET.fromstring(svg).attrib.items() >= {"role": "img", "aria-label": "half"}.items()
    # Also at the ends, and a narrow one is still seen.
    assert spans(interval_bar(0, 0, 0, Axis(0, 1, ()), ""), "accent") == [(0, 2)]
    assert spans(interval_bar(1, 1, 1, Axis(0, 1, ()), ""), "accent") == [(198, 2)]
    assert spans(interval_bar(2.0, 1.9, 2.1, Axis(0, 4, ()), ""), "band")[0] == (95, 10)
    for value in NOTHING:
        svg = interval_bar(value, value, 0.5, Axis(0, 1, ()), "")
        assert spans(svg, "band") == spans(svg, "accent") == []


def test_stacks_are_shares_of_their_sum() -> None:
    svg = stack([("a", 3, "tp"), ("b", 0, "fp"), ("c", 1, "fn")], "all")
    assert (spans(svg, "tp"), spans(svg, "fp"), spans(svg, "fn")) == ([(0, 75)], [], [(75, 25)])
    assert [said(each) for each in parts(svg, "tp")] == ["a: 75.0 %"]
    assert len(parts(stack([("a", 0, "tp")], ""), "tp")) == 0


def test_swatches() -> None:
    assert 'fill="rgb(1,2,255)"' in swatch((1, 2, 255))
    assert 'fill="rgb(44,255,0)"' in swatch((300, -1, 256))


def column_heights(svg: Markup, kind: str) -> list[float]:
    return [float(each.get("height", "")) for each in parts(svg, kind)]


def test_histograms_by_hand() -> None:
    svg = histogram([0, 1, 2, 4], [Layer("images", [1, 0, 4])], Axis(0, 4, ()), "h")
    heights = column_heights(svg, "accent")
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.01)
    (first, _), (second, wide) = spans(svg, "accent")
    assert second > first
    assert wide == pytest.approx(2 * (WIDTH - 52) / 4 - 1, abs=0.1)
    assert [said(each) for each in parts(svg, "accent")] == ["0.000 to 1.00: 1 images", "2.00 to 4.00: 4 images"]
    # Layers stand on each other, and a count that is not known is no column.
    svg = histogram([0, 1, 2], [Layer("tp", [2, 3], "tp"), Layer("fp", [1, None], "fp")], Axis(0, 2, ()), "h")
    (below,), (above,) = ([each for each in parts(svg, kind) if "0.000" in said(each)] for kind in ("tp", "fp"))
    bottom = float(above.get("y", "")) + float(above.get("height", ""))
    assert bottom == pytest.approx(float(below.get("y", "")), abs=0.02)
    assert len(parts(svg, "fp")) == 1
    # What lies beyond the edges is drawn outside the axis and counts for its height.
    svg = histogram([0, 1], [Layer("pixels", [5])], Axis(0, 1, ()), "h", beyond=(10, None), mark=0.5)
    (beyond,) = parts(svg, "rest")
    assert said(beyond) == "below 0.000: 10 pixels"
    assert float(beyond.get("x", "")) < 40
    assert float(beyond.get("height", "")) == pytest.approx(2 * column_heights(svg, "accent")[0], rel=0.01)
    assert len(parts(svg, "mark")) == 1


@pytest.mark.parametrize("counts", [[0, 0], [None, None]])
def test_empty_histograms(counts: list[Any]) -> None:
    svg = histogram([0, 1, 2], [Layer("images", counts)], nice_axis(0, 2), "h")
    assert parts(svg, "accent") == []
    assert "NaN" not in svg


def test_bins_of_one_ratio_are_equally_wide_on_a_scale_of_ratios() -> None:
    svg = histogram([1, 10, 100], [Layer("images", [1, 1])], log_axis(1, 100), "h")
    (_, first), (_, second) = spans(svg, "accent")
    assert first == pytest.approx(second)


def points(svg: Markup) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split() for pair in each.get("d", "")[1:].split("L"))]
        for each in parts(svg, "line")
    ]


def test_lines_go_through_their_points() -> None:
    svg = line_chart(
        [Series("up", [(0, 0), (0.5, None), (1, 1)]), Series("none", [(0, math.nan)])],
        share_axis("x"),
        share_axis("y"),
        "two",
        [(0.5, "half")],
    )
    assert points(svg) == [[(40, HEIGHT - 36), (WIDTH - 12, 10)]]
    assert "half" in svg
    assert [said(each) for each in parts(svg, "line")] == ["up"]
    # Values outside stay on the chart.
    svg = line_chart([Series("far", [(-1, 5)])], share_axis(), share_axis(), "")
    assert points(svg) == [[(40, 10)]]


def test_quality_maps() -> None:
    known = [Point(f"c{n}", n / 10, 0.9, f"class {n}", "stuff" if n % 2 else "thing") for n in range(1, 9)]
    svg = quality_map([*known, Point("none", None, 0.5, "-"), Point("nan", 0.5, math.nan, "-")], "q")
    dots = parts(svg, "dot")
    assert [said(dot) for dot in dots] == [f"class {n}" for n in range(1, 9)]
    across = [float(dot.get("cx", "")) for dot in dots]
    assert across == pytest.approx([40 + 288 * n / 10 for n in range(1, 9)], abs=0.01)
    assert len({dot.get("cy") for dot in dots}) == 1
    # The worst one is named; names do not lie on each other.
    names = [said(each) for each in parts(svg, "tick") if said(each).startswith("c")]
    assert names[0] == "c1"
    assert len(quality_map([], "q")) > 100
    assert ">0<" in quality_map([Point("a", 0.0, 0.0, "no match")], "q")


def test_heat_maps_by_hand() -> None:
    names = ["sky", "road", "car"]
    shares = [[0.98, 0.02, 0.001, 0.0], [None, None, None, None], [0.0, 0.4, 0.1, 0.5]]
    svg = heat_map(names, [*names, "no class"], shares, "c")
    right = {said(each): float(each.get("fill-opacity", "")) for each in parts(svg, "right")}
    wrong = {said(each): float(each.get("fill-opacity", "")) for each in parts(svg, "accent")}
    assert set(right) == {"sky right: 98.0 %", "car right: 10.0 %"}
    assert set(wrong) == {"sky seen as road: 2.0 %", "car seen as road: 40.0 %", "car seen as no class: 50.0 %"}
    assert sorted(wrong, key=wrong.__getitem__) == [
        "sky seen as road: 2.0 %",
        "car seen as road: 40.0 %",
        "car seen as no class: 50.0 %",
    ]
    assert [said(each) for each in parts(svg, "cell")] == ["98", "2", "40", "10", "50"]
    assert all(0 < value <= 1 for value in (*right.values(), *wrong.values()))


def test_large_heat_maps_stay_small() -> None:
    names = [f"a class with a long name, {n}" for n in range(41)]
    shares = [[0.7 if row == column else 0.3 / 40 for column in range(41)] for row in range(41)]
    svg = heat_map(names, names, shares, "c")
    assert len(parts(svg, "accent")) == 41 * 40
    assert parts(svg, "cell") == []
    assert len(svg) < 400_000
    width, height = (float(ET.fromstring(svg).get(side, "")) for side in ("width", "height"))
    assert 41 * 18 < width < 41 * 18 + 140
    assert 41 * 18 < height < 41 * 18 + 140


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.booleans())
@example(low=1e-10, span=1e-6, whole=True)
def test_ticks_are_round_and_inside(low: float, span: float, whole: bool) -> None:
    axis = nice_axis(low, low + span, whole=whole)
    values = [value for value, _ in axis.ticks]
    slack = 1e-6 * max(abs(axis.low), abs(axis.high), axis.high - axis.low)
    assert all(axis.low - slack <= value <= axis.high + slack for value in values)
    assert len(values) <= 10
    assert values == sorted(values)
    if whole:
        assert all(float(value).is_integer() for value in values)


@given(st.floats(1e-9, 1e9), st.floats(1.001, 1e9))
def test_scales_of_ratios_have_ticks(low: float, ratio: float) -> None:
    axis = log_axis(low, low * ratio)
    assert axis.log
    assert axis.place(axis.low) == 0
    assert axis.place(axis.high) == 1
    assert axis.place(math.sqrt(axis.low * axis.high)) == pytest.approx(0.5, abs=1e-3)
    assert 1 <= len(axis.ticks) <= 40


@given(NAMES)
def test_names_are_escaped(name: str) -> None:
    text = f'{name}<script>alert("1")</script>\'"&'
    drawn = [
        stack([(text, 1, "tp")], text),
        histogram([0, 1], [Layer(text, [1])], Axis(0, 1, ((0.5, text),), text), text),
        line_chart([Series(text, [(0, 0)])], share_axis(text), share_axis(text), text, [(0.5, text)]),
        quality_map([Point(text, 0.5, 0.5, text)], text),
        heat_map([text], [text, text], [[0.5, 0.5]], text),
        interval_bar(0.5, 0.4, 0.6, Axis(0, 1, ()), text),
    ]
    for svg in drawn:
        root = ET.fromstring(svg)
        assert root.tag == "svg"
        assert {each.tag for each in root.iter()} <= {"svg", "rect", "path", "circle", "text", "title"}
        assert root.get("aria-label") == text
        assert root.get("role") == "img"
