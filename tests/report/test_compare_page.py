"""The pages of differences and of agreement: what they say, that they are sound and safe, and fit a phone."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from compare_helpers import compared, two_runs
from page_helpers import PALETTE, TASKS, Tags, make_pictures, make_report
from report_helpers import SPACE, depth_score, row

from pipeline.report.compare.agreement_page import render_agreement
from pipeline.report.compare.cells import CHANGES, run_names, signed, signed_interval
from pipeline.report.compare.charts import difference_bar, diverging_bar
from pipeline.report.compare.page import render_comparison
from pipeline.report.compare.runs import settings, warnings
from pipeline.report.formats import DASH, figure_format
from pipeline.report.gallery import Panel, Picture

PAYLOADS = ("<script>window.owned=1</script>", '"><img src=x onerror="window.owned=1">', "{{ 7 * 7 }}", "\x00\u202e")
COLORS = {category.id: category.color for category in SPACE.categories}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    a, b = two_runs(3, 60)
    return compared(tmp_path_factory.mktemp("page"), a, b, replicates=60)


def pictures_of(comparison: dict[str, Any]) -> dict[str, list[Picture]]:
    panels = tuple(
        Panel(name, b"RIFF", "image/webp") for name in ("image", "target", "A", "B", "error of A", "error of B")
    )
    return {
        f"{end}:semantic.mIoU": [
            Picture(caption=entry["image_id"], panels=panels) for entry in comparison["images"]["semantic.mIoU"][end]
        ]
        for end in ("improved", "regressed")
    }


def agreement_of(kind: str) -> dict[str, Any]:
    """What compare.json would hold, with a report as the agreement."""
    report = make_report(kind)
    side = {"model": report["model"], "run": report["run"]}
    kept = {name: value for name, value in report.items() if name not in ("format", "model", "run", "worst", "best")}
    return {
        "format": 1,
        "a": side,
        "b": copy.deepcopy(side),
        "settings": [{"name": "model.version", "a": "1", "b": None}],
        "warnings": ["Classes of B that A does not have count as void: tower."],
        "taxonomy": "scenes",
        "mapping": {"source": "other", "target": "scenes"},
        "score": report["run"]["config"]["score"],
        "agreement": kept,
        "disagreement": report["worst"],
    }


def agreement_pictures(kind: str) -> dict[str, list[Picture]]:
    found = make_pictures(kind, make_report(kind))
    return {key.partition(":")[2]: pictures for key, pictures in found.items() if key.startswith("worst")}


@pytest.fixture(scope="module")
def pages(comparison: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    texts = {"difference": render_comparison(comparison, pictures_of(comparison), palette=COLORS)}
    texts |= {kind: render_agreement(agreement_of(kind), agreement_pictures(kind), palette=PALETTE) for kind in TASKS}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, "utf-8")
    return {name: folder / f"{name}.html" for name in texts}


PAGES = ["difference", *TASKS]


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_sound_html_of_their_own(pages: dict[str, Path], name: str) -> None:
    text = pages[name].read_text("utf-8")
    tags = Tags(text)
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    assert all(link.startswith("#") and link[1:] in tags.ids for link in tags.links)
    assert all(load.startswith("data:image/webp;base64,") for load in tags.loads)
    assert not re.search(r"\b(nan|None|inf|Undefined)\b", " ".join(tags.words))


@pytest.mark.parametrize("name", ["difference", "labels"])
@pytest.mark.parametrize("look", [{"width": 1280}, {"width": 390, "height": 844, "phone": True}], ids=["desk", "phone"])
def test_pages_fit_and_load_nothing(pages: dict[str, Path], browser: Browser, name: str, look: dict[str, Any]) -> None:
    with browser.tab(pages[name].as_uri(), **look) as tab:
        assert tab.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [look["width"]] * 2
        beyond = """[...document.querySelectorAll("main *")].filter((each) => !each.closest(".scroll, pre, caption")
            && each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.outerHTML.slice(0, 120))"""
        assert tab.evaluate(beyond) == []
        assert (tab.complaints(), tab.requests()) == ([], [])
        # Six panels: three columns of two where there is room, else two columns.
        tops = tab.evaluate("[...document.querySelectorAll('.panels')[0].children].map((each) => each.offsetTop)")
        expected = {"difference": [1, 2, 1, 2, 1, 2], "labels": [1, 1, 1, 1]}[name]
        if look.get("phone"):
            expected = [1, 1, 2, 2, 3, 3][: len(expected)]
        places = sorted(set(tops))
        assert [places.index(top) + 1 for top in tops] == expected


def poisoned(tree: Any, payload: str) -> Any:
    """The payload before every text but those that stand for something."""
    kept = {"change", "ok_in", "lacking_in", "image_id", "state"}
    if isinstance(tree, dict):
        return {key: value if key in kept else poisoned(value, payload) for key, value in tree.items()}
    if isinstance(tree, list):
        return [poisoned(value, payload) for value in tree]
    return f"{payload} {tree}" if isinstance(tree, str) else tree


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_comes_with_the_data_never_runs(
    comparison: dict[str, Any], browser: Browser, tmp_path: Path, payload: str
) -> None:
    found = poisoned(comparison, payload)
    for side in ("a", "b"):
        found[side]["run"]["config"] = {payload: [payload], "source": {"uri": payload, "format": payload}}
    found["settings"] = [{"name": payload, "a": payload, "b": None}]
    found["warnings"] = [payload]
    picture = Picture(caption=payload, panels=(Panel(payload, b"GIF89a", f'image/png"{payload}'),), note=payload)
    texts = {
        "difference": render_comparison(found, {"improved:semantic.mIoU": [picture] * 4}, palette=COLORS),
        "agreement": render_agreement(poisoned(agreement_of("labels"), payload), {"semantic.mIoU": [picture] * 4}),
    }
    for name, text in texts.items():
        assert Tags(text).open == []
        page = tmp_path / f"{name}.html"
        page.write_text(text, "utf-8")
        with browser.tab(page.as_uri(), width=800) as tab:
            assert tab.evaluate("window.owned") is None
            assert tab.evaluate("document.scripts.length") == 1
            assert tab.requests() == []
            assert "{{ 7 * 7 }}" not in payload or "{{ 7 * 7 }}" in tab.evaluate("document.body.textContent")


def words(text: str) -> str:
    """The text of a page without that of its charts."""
    return " ".join(" ".join(Tags(re.sub(r"<svg.*?</svg>", "", text)).words).split())


def test_the_page_says_what_the_comparison_says(comparison: dict[str, Any]) -> None:
    text = words(render_comparison(comparison, {}, palette=COLORS))
    for path, figure in comparison["figures"].items():
        shown = figure_format(path)
        cells = (shown.name, *(shown.show(figure[side]) for side in "ab"), signed(shown, figure["difference"]))
        assert " ".join(cells) in text, path
        if figure["interval"]:
            assert signed_interval(shown, figure["interval"]) in text
    for path, told in comparison["images"].items():
        counts = " ".join(str(told[name]) for name in ("better", "worse", "equal"))
        assert f"{figure_format(path).name} {counts}" in text
    for problem in comparison["problems"]:
        assert problem["examples"][0]["image_id"] in text
    for key, name in (("common", "images compared"), ("only_a", "ok in A alone"), ("neither", "ok in neither")):
        assert f"{comparison['counts'][key]} {name}" in text


def test_colour_only_where_the_interval_leaves_zero_out(comparison: dict[str, Any]) -> None:
    """A row's bar has the colour of better or worse just where its figure says so."""
    found = copy.deepcopy(comparison)
    for path, change in (("semantic.mIoU", "better"), ("depth.AbsRel", "worse")):
        found["figures"][path] |= {"change": change, "excludes_zero": True}
    text = render_comparison(found, {})
    table = text[text.index('aria-label="Figures of A and B"') : text.index('id="images"')]
    rows = re.findall(r'<tr>\s*<th scope="row".*?</tr>', table, re.DOTALL)
    assert len(rows) == len(found["figures"])
    seen = set()
    for line, figure in zip(rows, found["figures"].values(), strict=True):
        classes = set(re.findall(r'<rect class="([^"]*)"', line))
        kind = CHANGES[figure["change"]][2]
        assert kind in classes
        assert not ({"tp", "fp", "rest"} - {kind}) & classes
        assert (kind != "rest") == bool(figure["excludes_zero"])
        seen.add(kind)
    assert seen == {"tp", "fp", "rest"}


@pytest.mark.parametrize(
    ("change", "verdict"), [("better", "B is better: from"), ("worse", "B is worse: from"), ("unclear", "No clear")]
)
def test_the_verdict(comparison: dict[str, Any], change: str, verdict: str) -> None:
    found = copy.deepcopy(comparison)
    found["figures"]["semantic.mIoU"] |= {"change": change, "excludes_zero": change != "unclear"}
    text = render_comparison(found, {})
    assert verdict in words(text)
    kind = {"better": "figure tp", "worse": "figure fp", "unclear": "figure "}[change]
    assert f'<div class="{kind}">' in text


def test_classes_that_changed_most_come_first(comparison: dict[str, Any]) -> None:
    text = words(render_comparison(comparison, {}))
    text = text[text.index("IoU by class, those that changed most first") :]
    classes = comparison["per_class"]["semantic.IoU"].values()
    order = sorted(classes, key=lambda entry: -abs(entry["difference"]))
    places = [text.index(f" {entry['name']} ") for entry in order]
    assert places == sorted(places)


def test_without_intervals_and_without_classes(tmp_path: Path) -> None:
    a, b = ([row(f"s/{n}", depth_score(n + seed)) for n in range(5)] for seed in (0, 50))
    comparison = compared(tmp_path, a, b, replicates=0)
    text = words(render_comparison(comparison, {}))
    assert "B beside A: from" in text
    assert "Interval" not in text
    assert "Classes" not in text


def test_agreement_says_which_way(pages: dict[str, Path]) -> None:
    text = words(pages["labels"].read_text("utf-8"))
    assert "B held against A: 100 % where they agree everywhere" in text
    assert "B's classes (other) are mapped into A's (scenes)" in text
    assert "Classes of B that A does not have count as void: tower." in text
    assert "A and B differ" in text
    assert "B held against A: 0 where they agree everywhere" in words(pages["depth"].read_text("utf-8"))


def test_signed_numbers() -> None:
    share, error = figure_format("semantic.mIoU"), figure_format("depth.RMSE")
    assert [signed(share, value) for value in (0.0042, -0.1, 0.0, 0.00001, -0.00001, None)] == [
        "+0.42",
        "\N{MINUS SIGN}10.00",
        "0.00",
        "+<0.01",
        "\N{MINUS SIGN}<0.01",
        DASH,
    ]
    assert signed(share, 0.5, unit=True) == "+50.00 points"
    assert [signed(error, value, unit=True) for value in (0.01234, -1.5, 12.345)] == [
        "+0.0123 m",
        "\N{MINUS SIGN}1.500 m",
        "+12.35 m",
    ]
    assert signed_interval(share, [-0.01, 0.02]) == "\N{MINUS SIGN}1.00 to +2.00"
    assert signed_interval(share, None) == DASH


def test_charts_of_differences() -> None:
    drawn = str(difference_bar(0.5, -0.5, 1.0, 1.0, "tp", "half"))
    assert 'aria-label="half"' in drawn
    assert '<rect class="tp span" x="50" y="4" width="150" height="6">' in drawn
    assert '<rect class="tp" x="148.75"' in drawn
    beyond = str(difference_bar(5, None, None, 1.0, "fp"))
    assert 'x="198.75"' in beyond
    assert "span" not in beyond
    assert '<rect class="fp" x="50" y="3" width="50"' in str(diverging_bar(-0.5, None, None, 1.0, "fp"))
    assert str(diverging_bar(None, None, None, 1.0, "rest")).count("<rect") == 2


def side(version: str = "v1", **run: Any) -> dict[str, Any]:
    model = {"label": "m", "name": "net", "version": version, "task": "semantic", "mapping": None}
    return {"model": model, "run": {"state": "done", "config": {}, "code": {}, **run}}


def test_names_of_runs() -> None:
    a, b = side("v1"), side("v2")
    assert run_names({"a": a, "b": b}) == ("m v1", "m v2")
    b["model"]["label"] = "n"
    assert run_names({"a": a, "b": b}) == ("m", "n")


def test_settings_that_differ() -> None:
    models = [{"name": "other"}, {"name": "net", "label": "m", "weights": "none", "options": {"resize": 64}}]
    other = [{"name": "net", "label": "m", "weights": "none", "options": {"resize": 96, "precision": "bf16"}}]
    a = side(
        config={"models": models, "seed": 0, "output": {"uri": "x"}, "source": {"limit": 5}}, code={"torch": "2.1"}
    )
    b = side("v2", config={"models": other, "seed": 0, "output": {"uri": "y"}, "source": {}}, code={"torch": "2.2"})
    assert settings(a, a) == []
    assert settings(a, b) == [
        {"name": "model.version", "a": "v1", "b": "v2"},
        {"name": "model.config.options.resize", "a": "64", "b": "96"},
        {"name": "config.source.limit", "a": "5", "b": None},
        {"name": "code.torch", "a": "2.1", "b": "2.2"},
        {"name": "model.config.options.precision", "a": None, "b": "bf16"},
    ]


def test_warnings() -> None:
    a = side(config={"score": {"boundary": True, "depth": {"crop": "none"}}, "source": {"uri": "x", "limit": 3}})
    b = side(
        state="running",
        config={"score": {"boundary": True, "depth": {"crop": "nyu_eigen"}}, "source": {"uri": "y", "limit": 9}},
    )
    assert warnings(a, a) == []
    assert warnings(a, b) == [
        "A and B were scored with other options (depth.crop: none, nyu_eigen).",
        "A and B were scored against targets of other sources (uri differ).",
        "The run of B is not done: its state is running.",
    ]


def test_the_same_comparison_gives_the_same_page(comparison: dict[str, Any]) -> None:
    assert render_comparison(comparison, {}) == render_comparison(copy.deepcopy(comparison), {})
