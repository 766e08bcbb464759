"""The page, in a real headless Chromium: complete, readable on a phone and in the dark, sortable, and safe."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from page_helpers import (
    FIGURES,
    PALETTE,
    TASKS,
    Tags,
    empty_report,
    headlines,
    look_up,
    make_pictures,
    make_report,
    wide_report,
)
from PIL import Image

from pipeline.printable import printable
from pipeline.report.formats import count, duration, figure_format, moment, number, percent, size
from pipeline.report.gallery import Panel, Picture
from pipeline.report.page import render_page

MAX_PAGE_BYTES = 3_000_000
DESKTOP, PHONE = {"width": 1280}, {"width": 390, "height": 844, "phone": True}
PAYLOADS = (
    "<script>window.owned=1</script>",
    "</script><script>window.owned=1</script>",
    "</title></style><script>window.owned=1</script>",
    '"><img src=x onerror="window.owned=1">',
    "' onmouseover='window.owned=1' x='",
    "</svg><svg onload=window.owned=1>",
    "{{ 7 * 7 }}{% for x in y %}",
    "javascript:window.owned=1",
    "]]>--><!--\x00\x1b[31m\u202e",
)

Make = Callable[[], tuple[dict[str, Any], dict[str, list[Picture]]]]


def whole(kind: str) -> tuple[dict[str, Any], dict[str, list[Picture]]]:
    report = make_report(kind)
    return report, make_pictures(kind, report)


REPORTS: dict[str, Make] = {
    **{kind: lambda kind=kind: whole(kind) for kind in TASKS},  # type: ignore[misc]
    "wide": lambda: (wide_report(), {}),
    "empty": lambda: (empty_report(), {}),
    "nothing": lambda: ({"format": 1}, {}),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, make in REPORTS.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(render_page(*make(), palette=PALETTE), "utf-8")
    return found


@pytest.mark.parametrize("name", REPORTS)
def test_pages_are_sound_html_of_their_own(pages: dict[str, Path], name: str) -> None:
    text = pages[name].read_text("utf-8")
    tags = Tags(text)
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    assert all(link.startswith("#") and link[1:] in tags.ids for link in tags.links)
    assert all(re.match(r"data:image/webp;base64,[\w+/=]+$", load) for load in tags.loads)
    assert "iframe" not in tags.tags
    assert len(text.encode()) < MAX_PAGE_BYTES
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"\b(nan|None|inf|Undefined)\b", " ".join(tags.words))


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("look", [DESKTOP, PHONE, DESKTOP | {"dark": True}], ids=["desktop", "phone", "dark"])
def test_pages_fit_and_load_nothing(pages: dict[str, Path], browser: Browser, name: str, look: dict[str, Any]) -> None:
    with browser.tab(pages[name].as_uri(), **look) as tab:
        assert tab.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [look["width"]] * 2
        # Nothing but what scrolls in itself reaches beyond the edge.
        beyond = """[...document.querySelectorAll("main *")].filter((each) => !each.closest(".scroll, pre, caption")
            && each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.outerHTML.slice(0, 120))"""
        assert tab.evaluate(beyond) == []
        assert tab.evaluate("[...document.images].filter((each) => !each.naturalWidth).length") == 0
        assert (tab.complaints(), tab.requests()) == ([], [])
        red, green, blue = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("RGB"))[5, 5].tolist()
        assert max(red, green, blue) < 60 if look.get("dark") else min(red, green, blue) > 240


def test_text_can_be_read_in_both_schemes(pages: dict[str, Path], browser: Browser) -> None:
    """WCAG's contrast of all text with what lies behind it: 4.5, or 3 where it is dim on purpose."""
    measure = """(() => {
      const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
      const channels = (color) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
      };
      const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
      const behind = (node) => {
        for (; node; node = node.parentElement) {
          const color = channels(getComputedStyle(node).backgroundColor);
          if (color[3] > 200) return color;
        }
        return [255, 255, 255, 255];
      };
      const bad = [];
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        const said = walker.currentNode.data.trim();
        if (!said || !node.checkVisibility() || node.closest("svg, script, style, .dim")) continue;
        const [a, b] = [light(channels(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) bad.push([node.className, said, (a + 0.05) / (b + 0.05)]);
      }
      return bad;
    })()"""
    for dark in (False, True):
        with browser.tab(pages["labels"].as_uri(), width=1280, dark=dark) as tab:
            assert tab.evaluate(measure) == []


def test_paper_is_white(pages: dict[str, Path], browser: Browser) -> None:
    with browser.tab(pages["labels"].as_uri(), width=1280, dark=True) as tab:
        tab.ask(
            "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
        )
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert tab.pdf().startswith(b"%PDF")


ROWS = """[...document.querySelectorAll("%s tbody tr")]
    .map((row) => [...row.cells].map((cell) => cell.innerText.trim()))"""
CLASSES = "#semantic-classes table"


def column(tab: Any, at: int, table: str = CLASSES) -> list[str]:
    return [row[at] for row in tab.evaluate(ROWS % table)]


def test_tables_are_sorted_by_a_click(pages: dict[str, Path], browser: Browser) -> None:
    with browser.tab(pages["wide"].as_uri(), width=1280) as tab:
        tab.evaluate("document.querySelector('#semantic-classes .unfold').click()")

        def click(at: int) -> str:
            head = f"document.querySelectorAll('{CLASSES} thead th')[{at}]"
            tab.evaluate(f"{head}.querySelector('button').click()")
            return str(tab.evaluate(f"{head}.ariaSort"))

        for at, first, second in (
            (1, "descending", "ascending"),
            (5, "descending", "ascending"),
            (0, "ascending", "descending"),
        ):
            for direction in (first, second, first):
                assert click(at) == direction
                values = column(tab, at)
                known = [value for value in values if value != "–"]
                assert values[len(known) :] == ["–"] * (len(values) - len(known))  # no evidence comes last, always
                keys = [value.lower() if at == 0 else float(value.strip("<>")) for value in known]
                assert keys == sorted(keys, reverse=direction == "descending")
        assert len(values) == 150
        assert tab.evaluate(f"document.querySelectorAll('{CLASSES} th[aria-sort]').length") == 1
        assert tab.complaints() == []


def visible(tab: Any) -> int:
    rows = f"[...document.querySelectorAll('{CLASSES} tbody tr')]"
    return int(tab.evaluate(f"{rows}.filter((row) => row.offsetHeight > 0).length"))


def test_long_tables_are_folded_by_the_script_alone(pages: dict[str, Path], browser: Browser) -> None:
    with browser.tab(pages["wide"].as_uri(), width=1280) as tab:
        assert visible(tab) == 20
        assert tab.evaluate("document.querySelector('.unfold').innerText") == "Show all 150 rows"
        tab.evaluate("document.querySelector('.unfold').click()")
        assert visible(tab) == 150
        tab.evaluate("document.querySelector('.unfold').click()")
        assert visible(tab) == 20
        tab.ask("Emulation.setEmulatedMedia", media="print")
        assert visible(tab) == 150
        tab.ask("Emulation.setEmulatedMedia", media="")
        tab.ask("Emulation.setScriptExecutionDisabled", value=True)
        tab.ask("Page.reload")
        browser.loop.run_until_complete(browser.wait("Page.loadEventFired"))
        assert visible(tab) == 150
    with browser.tab(pages["labels"].as_uri(), width=1280) as tab:
        assert tab.evaluate("document.querySelectorAll('.unfold').length") == 0


def poisoned(tree: Any, payload: str) -> Any:
    """All text of a report replaced, but for the names that the page looks things up by."""
    if isinstance(tree, dict):
        kept = ("kind", "format", "level", "level_text")
        return {key: value if key in kept else poisoned(value, payload) for key, value in tree.items()}
    if isinstance(tree, list):
        return [poisoned(value, payload) for value in tree]
    return f"{payload} {tree}" if isinstance(tree, str) else tree


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_comes_with_the_data_never_runs(browser: Browser, tmp_path: Path, payload: str) -> None:
    panel = Panel(payload, b"GIF89a", f'image/png"{payload}')
    pictures = {
        f"{end}{payload}": [Picture(caption=payload, value=0.5, panels=(panel,), note=payload)]
        for end in ("worst:semantic.mIoU", "best:", "")
    }
    for kind in TASKS:
        report = poisoned(make_report(kind), payload)
        mapping = {"source": payload, "target": payload, "mapped": {payload: payload}, "unmapped": [payload],
                   "unmapped_become": payload, "unused": [payload]}  # fmt: skip
        report["model"]["mapping"] = mapping
        report["run"]["config"] = {payload: [payload, {"a": payload}], "source": {"uri": payload, "format": payload}}
        report["run"]["code"] = {payload: payload}
        page = tmp_path / f"{kind}.html"
        text = render_page(report, pictures, palette=PALETTE)
        assert Tags(text).open == []
        page.write_text(text, "utf-8", errors="surrogatepass")
        with browser.tab(page.as_uri(), width=800) as tab:
            moves = "[...document.querySelectorAll('*')].forEach((each) => each.dispatchEvent(new Event('mouseover')))"
            tab.evaluate(moves)
            assert tab.evaluate("window.owned") is None
            assert tab.evaluate("document.scripts.length") == 1
            assert tab.requests() == []
            shown = tab.evaluate("document.body.textContent")
            assert printable(payload) in shown


def test_the_policy_stops_what_was_not_escaped(pages: dict[str, Path], browser: Browser, tmp_path: Path) -> None:
    """A second lock: scripts, styles and loads that are not the page's own are refused by the browser."""
    slipped = (
        "<script>window.owned=1</script><img src=x onerror='window.owned=1'><img src='https://example.invalid/a.png'>"
        "<p id=late style='color:rgb(1,2,3)'>x</p><style>body{color:rgb(1,2,3)}</style>"
        "<link rel=stylesheet href='https://example.invalid/a.css'><form action='https://example.invalid'></form>"
    )
    text = pages["labels"].read_text("utf-8")
    page = tmp_path / "slipped.html"
    page.write_text(text.replace("<footer>", f"{slipped}<footer>", 1), "utf-8")
    with browser.tab(page.as_uri(), width=800) as tab:
        assert tab.evaluate("document.querySelector('#late') !== null")
        assert tab.evaluate("window.owned") is None
        assert tab.evaluate("getComputedStyle(document.querySelector('#late')).color") != "rgb(1, 2, 3)"
        assert len([line for line in tab.complaints() if "Content Security Policy" in line]) >= 4
        assert len(tab.requests()) >= 2
        assert sorted(tab.blocked()) == sorted(tab.requests())


def shown_text(report: dict[str, Any], pictures: dict[str, list[Picture]] | None = None) -> str:
    return " ".join(" ".join(Tags(render_page(report, pictures or {}, palette=PALETTE)).words).split())


@pytest.mark.parametrize("kind", TASKS)
def test_the_page_says_what_the_report_says(kind: str) -> None:
    report = make_report(kind)
    text = shown_text(report, make_pictures(kind, report))
    for path in headlines(kind):
        shown, (low, high) = figure_format(path), report["intervals"][path]
        assert shown.show(look_up(report, path)) in text
        assert f"{shown.show(low)} to {shown.show(high)}" in text
        assert shown.name in text or kind == "objects"
    for entry in report["worst"][FIGURES[kind]] + report["best"][FIGURES[kind]]:
        assert entry["image_id"] in text
    assert "The figures cover 24 of 28 images (85.7 %): 2 failed, 1 without a target, 1 without a prediction." in text
    for problem in report["problems"]:
        assert all(example["message"] in text and example["image_id"] in text for example in problem["examples"])
    for word in (
        "9f3b1c20a7d4",
        "c0ffee1234567890",
        "2684d6d",
        "Apache-2.0",
        "1.43 images/s",
        "predict 54 %",
        "2.3 MB",
    ):
        assert word in text
    for city in ("Aachen", "Bochum", "Ulm"):
        assert city in text
    assert "unet_small_scenes" in text


def rows_of(text: str, section: str) -> list[list[tuple[str, str]]]:
    """Cells of the first table of a section: their text and what they are sorted by."""
    table = text[text.index(f'<section id="{section}"') :]
    table = table[table.index("<tbody>") : table.index("</tbody>")]
    return [
        [
            (re.sub(r"<[^>]*>", "", cell).strip(), value)
            for value, cell in re.findall(r'data-v="([^"]*)"[^>]*>(.*?)</t[dh]>', row, re.S)
        ]
        for row in table.split("</tr>")[:-1]
    ]


def test_class_tables_hold_the_figures_of_each_class() -> None:
    report = make_report("labels")
    rows = {row[0][0]: row for row in rows_of(render_page(report, {}), "semantic-classes")}
    per_class = report["semantic"]["per_class"]
    assert set(rows) == {row["name"] for row in per_class.values()}
    total = sum(row["target"] for row in per_class.values())
    for identifier, row in per_class.items():
        cells = rows[row["name"]]
        expected = [row["IoU"], report["boundary"]["per_class"][identifier]["IoU"], row["intersection"] / row["pred"],
                    row["accuracy"], row["dice"], row["target"] / total]  # fmt: skip
        assert [cell[0] for cell in cells[1:]] == [percent(value) for value in expected]
        assert [float(cell[1]) for cell in cells[1:]] == pytest.approx(expected)
    worst_last = [float(row[1][1]) for row in rows.values()]
    assert worst_last == sorted(worst_last, reverse=True)


def test_confusions_in_words() -> None:
    report = make_report("labels")
    matrix = np.array(report["semantic"]["confusion"]["matrix"])
    names = report["semantic"]["confusion"]["names"]
    share = matrix / matrix.sum(axis=1, keepdims=True)
    share[np.arange(len(names)), np.arange(len(names))] = 0
    row, at = np.unravel_index(share.argmax(), share.shape)
    ((words, _), (value, exact), (pixels, _)) = rows_of(render_page(report, {}), "confusion")[0]
    assert words == f"{names[row]} seen as {names[at]}"
    assert (value, float(exact), pixels) == (
        percent(share[row, at]),
        pytest.approx(share[row, at]),
        count(int(matrix[row, at])),
    )


def test_no_evidence_is_a_dash_and_never_a_zero() -> None:
    report = empty_report()
    page = render_page(report, {})
    text = shown_text(report)
    assert "0 of 4 images could be scored: there are no figures." in text
    assert not re.search(r"mIoU \(?p?r?e?s?e?n?t?\)? *0", text)
    ((_, iou, *_),) = rows_of(page, "semantic-classes")
    assert iou == ("–", "")
    assert '<tr class="dim">' in page
    wide = wide_report()
    gone = [row["name"] for row in wide["semantic"]["per_class"].values() if row["IoU"] is None]
    cells = {row[0][0]: row for row in rows_of(render_page(wide, {}), "semantic-classes")}
    assert len(gone) == 7
    assert all(cells[name][1] == ("–", "") for name in gone)
    assert "7 of 150 classes have no evidence" in shown_text(wide)
    assert "mIoU is the mean over 143 of 150 classes" in shown_text(wide)
    assert "mIoU is the mean over all 8 classes" in shown_text(make_report("labels"))


@pytest.mark.parametrize("kind", TASKS)
def test_reports_with_holes(kind: str) -> None:
    """Any part may be absent or null, and so may each figure."""
    report = make_report(kind)
    for name in report:
        for hole in (None, {}, []):
            render_page({**report, name: hole}, {})
        render_page({key: value for key, value in report.items() if key != name}, {})

    def without_numbers(tree: Any, inside: str = "") -> Any:
        if isinstance(tree, dict):
            return {key: without_numbers(value, key) for key, value in tree.items()}
        if isinstance(tree, list):
            return tree if inside in ("edges", "matrix") else [without_numbers(value) for value in tree]
        return None if isinstance(tree, int | float) else tree

    metrics = ("semantic", "boundary", "panoptic", "boundary_panoptic", "detection", "depth", "counts", "intervals")
    report |= {name: without_numbers(report[name]) for name in metrics if name in report}
    text = shown_text(report)
    assert "–" in text
    assert not re.search(r"\b(nan|None)\b", text)


def test_a_report_of_several_tasks_has_all_of_them() -> None:
    both: dict[str, Any] = {}
    for kind in TASKS:
        both |= make_report(kind)
    text = render_page(both, {}, palette=PALETTE)
    tags = Tags(text)
    assert {"semantic", "panoptic", "detection", "depth"} <= set(tags.ids)
    assert len(set(tags.ids)) == len(tags.ids)
    assert text.index("mIoU") < text.index("PQ")


def test_several_slicings_and_values_without_images() -> None:
    report = make_report("labels")
    first = report["slices"]
    nothing = {"value": "(none)", "counts": {"images": 3, "ok": 0, "failed": 3}, "semantic": {"mIoU": None}}
    report["slices"] = [first, {"by": "camera, night", "values": [nothing]}]
    page = render_page(report, {})
    assert "By city" in page
    assert "By camera, night" in page
    assert [row[0][0] for row in rows_of(page, "slices")] == ["Aachen", "Bochum", "Ulm"]
    assert "(none)" in page


def test_definitions_say_what_was_scored() -> None:
    report = make_report("depth")
    assert (
        "Predictions are scored as they are; the whole image is scored. Targets count from 0.001 m to 65.0 m"
        in shown_text(report)
    )
    report["run"]["config"]["score"]["depth"] |= {"alignment": "median", "crop": "nyu_eigen", "max_depth": None}
    text = shown_text(report)
    assert "Each prediction is scaled by the ratio of medians; the crop nyu_eigen is scored" in text
    assert "from 0.001 m on" in text
    report = make_report("labels")
    assert "Target ids outside the label space are void too" not in shown_text(report)
    report["run"]["config"]["score"]["unknown_is_void"] = True
    assert "Target ids outside the label space are void too" in shown_text(report)
    assert "as panopticapi has it" in shown_text(make_report("panoptic"))
    report = make_report("objects")
    assert "95 % of 1000 bootstrap replicates, which draw images anew" in shown_text(report)
    report["bootstrap"]["fewer"] = {"detection.bbox": 200, "detection.segm": 150}
    assert "As COCOeval has it" in shown_text(report)
    assert "1000 bootstrap replicates (150 for detection" in shown_text(report)


def test_mappings_are_shown() -> None:
    report = make_report("labels")
    report["model"]["mapping"] = {
        "source": "coco80", "target": "scenes", "mapped": {"car": "car", "truck": "car"}, "unmapped": ["giraffe"],
        "unmapped_become": "void", "unused": ["sky", "road"],
    }  # fmt: skip
    text = shown_text(report)
    for word in ("coco80", "truck", "giraffe", "No class of the model counts as sky, road: they score 0."):
        assert word in text


def test_images_of_one_size_need_no_chart() -> None:
    report = make_report("labels")
    assert "Sizes of the images" in shown_text(report)
    report["sizes"] = {"edges": [0.049, 0.051], "counts": [28], "unit": "megapixels"}
    text = shown_text(report)
    assert "All images have about 0.049 megapixels." in text
    assert "Sizes of the images" not in text


def test_an_unfinished_run_is_said() -> None:
    report = make_report("labels")
    assert "not done" not in shown_text(report)
    report["run"]["state"] = "interrupted"
    assert "The run is not done: its state is interrupted." in shown_text(report)


def test_the_same_report_gives_the_same_page() -> None:
    report = make_report("panoptic")
    again = json.loads(json.dumps(report))
    pictures = make_pictures("panoptic", report)
    assert render_page(report, pictures, palette=PALETTE) == render_page(again, pictures, palette=PALETTE)


def test_numbers_as_people_read_them() -> None:
    assert [percent(value) for value in (0, 1, 0.7123, 0.99999, 0.00001, None, float("nan"))] == [
        "0.0", "100.0", "71.2", ">99.9", "<0.1", "–", "–",
    ]  # fmt: skip
    assert [number(value) for value in (0.14, 4.256, 57.06, 1234.5, -0.5, None)] == [
        "0.140", "4.26", "57.1", "1,234", "-0.500", "–",
    ]  # fmt: skip
    assert [size(value) for value in (0, 999, 2_345_678, 7.1e15, None)] == [
        "0 bytes",
        "999 bytes",
        "2.3 MB",
        "7,100.0 TB",
        "–",
    ]
    assert [duration(value) for value in (0.71, 59.94, 139, 11_040, None)] == [
        "0.7 s",
        "59.9 s",
        "2 min 19 s",
        "3 h 04 min",
        "–",
    ]
    assert moment("2026-03-01T09:45:12+02:00") == "2026-03-01 07:45 UTC"
    assert moment("2026-03-01T09:45:12") == "2026-03-01 09:45"
    assert moment("yesterday") == "yesterday"
    paths = ("panoptic.Things.PQ", "boundary.mIoU", "detection.bbox.AP50", "a.b")
    assert [figure_format(path).name for path in paths] == [
        "PQ, things", "boundary mIoU", "AP50, boxes", "b",
    ]  # fmt: skip
    assert figure_format("depth.RMSE").show(4.25, unit=True) == "4.25 m"
    assert figure_format("semantic.mIoU").show(None, unit=True) == "–"
