"""The viewer's page in a real headless Chromium: rows, masks, keys, links; nothing of a table runs or is fetched."""

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from browser import Browser, Tab
from PIL import Image
from viewer_helpers import SCENES, Running, make_row, running, samples, write_rows, write_run, write_table

from pipeline.printable import printable

PAYLOADS = (
    "<script>window.owned=1</script>",
    "</script><script>window.owned=1</script>",
    '"><img src=x onerror="window.owned=1">',
    "' onmouseover='window.owned=1' x='",
    "</svg><svg onload=window.owned=1>",
    "javascript:window.owned=1",
    "${window.owned=1}",
    "]]>--><!--\x1b[31m\u202e",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    uri = tmp_path_factory.mktemp("page") / "labels"
    write_table(uri)
    with running(uri) as opened:
        yield opened


def until(tab: Tab, condition: str, seconds: float = 20) -> Any:
    """The value of an expression once it is true."""
    end = time.monotonic() + seconds
    while not (value := tab.evaluate(condition)):
        assert time.monotonic() < end, (
            f"not in time: {condition}; the page says {tab.evaluate('document.body.innerText')!r}"
        )
        time.sleep(0.05)
    return value


def press(tab: Tab, key: str) -> None:
    named = {"ArrowRight": 39, "ArrowLeft": 37, "Enter": 13, "Escape": 27}
    code = {"key": key, "windowsVirtualKeyCode": named.get(key, ord(key[0].upper()))}
    text = {} if key in named and key != "Enter" else {"text": "\r" if key == "Enter" else key}
    tab.ask("Input.dispatchKeyEvent", type="keyDown", **code, **text)
    tab.ask("Input.dispatchKeyEvent", type="keyUp", **code)


CARDS = "[...document.querySelectorAll('.card .name')].map((card) => card.textContent)"
CANVASES = "[...document.querySelectorAll('.card canvas')]"
DRAWN = f"{CANVASES}.length > 0 && {CANVASES}.every((one) => one.width > 4)"
OPEN = "document.getElementById('detail').open && document.getElementById('name').textContent"
READY = "document.querySelectorAll('#legend .chip').length"


def set_filter(tab: Tab, name: str, value: str) -> None:
    tab.evaluate(
        f"""{{ const field = document.forms.filters.elements[{json.dumps(name)}];
        field.value = {json.dumps(value)}; field.dispatchEvent(new Event("change", {{bubbles: true}})); }}"""
    )


def test_browsing_with_keys_and_links(server: Running, browser: Browser) -> None:
    with browser.tab(server.base, width=1280) as tab:
        until(tab, DRAWN)
        cards = tab.evaluate(CARDS)
        assert len(cards) == 12
        assert "12 of 12 rows" in tab.evaluate("document.getElementById('progress').textContent")
        # Filters: what the server finds, and in the address.
        set_filter(tab, "status", "failed")
        failed = server.json("api/rows?model=maps&status=failed")["rows"]
        until(tab, f"document.querySelectorAll('.card').length === {len(failed)}")
        assert "status=failed" in tab.evaluate("location.hash")
        assert tab.evaluate("document.querySelector('.broken').textContent") == "CorruptImageErrormade to fail"
        tab.evaluate("history.back()")
        until(tab, f"{CARDS}.length === 12")
        # Keys: to a card, open, along the row, close.
        press(tab, "ArrowRight")
        first_ok = server.json("api/rows?model=maps&status=ok")["rows"][0]
        at = cards.index(first_ok["image"])
        for _ in range(at):
            press(tab, "ArrowRight")
        press(tab, "Enter")
        assert until(tab, OPEN) == first_ok["image"]
        until(tab, READY)
        assert tab.evaluate("[...document.querySelectorAll('.panel b')].map((one) => one.textContent)") == [
            "image", "maps", "objects", "near", "target",
        ]  # fmt: skip
        press(tab, "2")
        until(tab, "document.querySelectorAll('.panel[hidden]').length === 1")
        assert "off=maps" in tab.evaluate("location.hash")
        press(tab, "2")
        # Space takes the masks away and brings them back.
        pixels = "document.querySelectorAll('.panel canvas')[1].toDataURL()"
        with_masks = until(tab, f"document.querySelectorAll('.panel canvas')[1].width > 4 && {pixels}")
        press(tab, " ")
        assert tab.evaluate(pixels) != with_masks
        press(tab, " ")
        assert tab.evaluate(pixels) == with_masks
        press(tab, "]")
        assert "opacity=65" in tab.evaluate("location.hash")
        assert tab.evaluate(pixels) != with_masks
        press(tab, "ArrowRight")
        assert until(tab, f"{OPEN} !== {json.dumps(first_ok['image'])} && {OPEN}") == cards[at + 1]
        link = tab.evaluate("location.href")
        press(tab, "Escape")
        until(tab, "!document.getElementById('detail').open")
        assert "at=" not in tab.evaluate("location.hash")
        assert tab.complaints() == []
        assert all(url.startswith(server.base) for url in tab.requests())
    with browser.tab(link, width=1280) as tab:
        assert until(tab, OPEN) == cards[at + 1]
        assert tab.evaluate("document.getElementById('opacity').value") == "65"


def test_the_pointer_says_the_class_and_the_colours_are_the_masks(server: Running, browser: Browser) -> None:
    row = server.json("api/rows?model=maps&status=ok")["rows"][0]
    _, _, body = server.ask(f"api/map?model=maps&shard={row['shard'].replace('#', '%23')}&position={row['position']}")
    length = int.from_bytes(body[:4], "little")
    entries = json.loads(body[4 : 4 + length])["entries"]
    code_HW = np.frombuffer(body[4 + length :], "<u2").reshape(48, 64)
    whose = {"model": "maps", "of": "maps", "in": row["shard"], "at": row["position"]}
    link = f"{server.base}#{urlencode({**whose, 'opacity': 100, 'outlines': 'off'})}"
    with browser.tab(link, width=1280) as tab:
        until(tab, READY)
        drawn = tab.evaluate(
            "[...document.querySelectorAll('.panel canvas')[1].getContext('2d').getImageData(0, 0, 64, 48).data]"
        )
        rgb_HWC = np.array(drawn, np.uint8).reshape(48, 64, 4)[..., :3]
        for y, x in ((4, 4), (24, 32), (44, 60)):
            box = tab.evaluate(
                "(({left, top, width, height}) => [left, top, width, height])"
                "(document.querySelectorAll('.view')[1].getBoundingClientRect())"
            )
            place = {"x": box[0] + box[2] * (x + 0.5) / 64, "y": box[1] + box[3] * (y + 0.5) / 48}
            tab.ask("Input.dispatchMouseEvent", type="mouseMoved", **place)
            said = tab.evaluate("document.querySelectorAll('.panel .value')[1].textContent")
            entry = entries[code_HW[y, x] - 1] if code_HW[y, x] else None
            assert said == (entry["name"] if entry else "–")
            if entry:
                assert rgb_HWC[y, x].tolist() == entry["color"]
        assert tab.complaints() == []


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Running]:
    """A table every text of which is what an attacker would write."""
    rows = []
    base = make_row(samples()[0], "objects", 1)
    for position, text in enumerate(PAYLOADS):
        broken = {"status": "failed", "error_type": text, "error_stage": text, "error_message": text, "attempts": 2}
        own = broken if position % 2 else {"status": "ok"}
        shard = {"shard_id": text, "position": position, "image_id": text, "fields": {text: text}, "run_id": text}
        rows.append(("objects", {**base, **shard, **own}))
    write_rows(tmp_path, rows)
    write_run(tmp_path, ["objects"])
    run = json.loads((tmp_path / "run.json").read_text())
    for category, text in zip(run["models"][0]["taxonomy"]["categories"], PAYLOADS, strict=False):
        category["name"] = text
    run |= {"run_id": PAYLOADS[0], "state": PAYLOADS[2], "config": {"source": {**SCENES, "format": PAYLOADS[0]}}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with running(tmp_path) as opened:
        yield opened


def test_nothing_of_a_table_runs(hostile: Running, browser: Browser) -> None:
    with browser.tab(f"{hostile.base}#model=objects&class=<img src=x onerror=window.owned=1>", width=1280) as tab:
        until(tab, "document.getElementById('nothing').textContent.includes('class')")
        tab.evaluate("document.getElementById('clear').click()")
        until(tab, f"{CARDS}.length === {len(PAYLOADS)}")
        assert sorted(tab.evaluate(CARDS)) == sorted(map(printable, PAYLOADS))
        text = tab.evaluate("document.body.innerText")
        assert "gray squares" in text
        assert printable(PAYLOADS[0]) in text
        for card in range(len(PAYLOADS)):
            name = tab.evaluate(f"document.querySelectorAll('.card')[{card}].click(); {CARDS}[{card}]")
            until(tab, f"{OPEN} === {json.dumps(name)} && document.querySelectorAll('#facts tr').length > 2")
            assert tab.evaluate("document.getElementById('facts').textContent").count(name) >= 3
            press(tab, "Escape")
            until(tab, "!document.getElementById('detail').open")
        assert tab.evaluate("window.owned") is None
        assert tab.evaluate("document.querySelectorAll('script').length") == 1
        assert (
            tab.evaluate("document.querySelectorAll('svg, iframe, a, [onerror], [onload], [onmouseover]').length") == 0
        )
        assert all(url.startswith(hostile.base) for url in tab.requests())
        assert tab.blocked() == []
        # What a script of the data could do if there were one: nothing, by the policy.
        tab.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.owned=1'}))"
        )
        assert tab.evaluate("window.owned") is None


def test_a_phone_and_the_dark(server: Running, browser: Browser) -> None:
    for dark in (False, True):
        with browser.tab(server.base, width=390, height=844, phone=True, dark=dark) as tab:
            until(tab, "document.querySelector('.card canvas')?.width > 4")  # others are read when they come into view
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390
            shown = np.asarray(Image.open(io.BytesIO(tab.screenshot(whole=False))).convert("L"))
            assert bool(np.median(shown[:, :20]) < 60) is dark
            tab.evaluate("document.querySelector('.card canvas').closest('.card').click()")
            until(tab, READY)
            assert tab.evaluate("document.getElementById('detail').scrollWidth") <= 390
            assert tab.complaints() == []
