"""The viewer over HTTP: who gets an answer, and which; nothing of a request is a path, nothing is changed."""

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from PIL import Image
from viewer_helpers import TOKEN, Running, running, samples, write_table

from jobs import view
from pipeline.errors import ConfigError, SchemaError
from pipeline.images import decode_image
from pipeline.viewer.app import HEADERS, is_local, make_app, new_token
from pipeline.viewer.scan import Stop
from pipeline.viewer.viewer import Viewer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    uri = tmp_path_factory.mktemp("app") / "labels"
    write_table(uri)
    with running(uri) as opened:
        yield opened


def words(row: dict[str, Any], **more: Any) -> str:
    keys = ("model", "version", "shard", "position")
    return urlencode({**{name: row[name] for name in keys}, **more})


@pytest.fixture(scope="module")
def row(server: Running) -> dict[str, Any]:
    """A row that is ok, of the model of label maps."""
    found: dict[str, Any] = server.json("api/rows?model=maps&status=ok")["rows"][0]
    return found


def test_the_page_and_what_it_asks_for(server: Running, row: dict[str, Any]) -> None:
    for name in ("", "view.js", "draw.js", "view.css", "icon.svg"):
        status, headers, body = server.ask(name)
        assert (status, bool(body)) == (200, True)
        assert headers["content-type"].endswith("charset=utf-8")
    table = server.json("api/table")
    assert (table["rows"], table["source"], len(table["models"])) == (36, "", 3)
    assert [entry["id"] for entry in table["models"][0]["classes"]]
    detail = server.json(f"api/row?{words(row)}")["rows"]
    assert {one["model"] for one in detail} == {"maps", "objects", "near"}
    assert detail[0]["model"] == "maps"
    assert detail[0]["fields"] == [["city", "zürich"]]
    status, headers, body = server.ask(f"api/image?{words(row)}")
    assert (status, headers["content-type"], headers["x-image-size"]) == (200, "image/jpeg", "64 48")
    shown = np.asarray(Image.open(io.BytesIO(body))).astype(int)
    # JPEG is not exact, but of all images of the source this is the one.
    error = {(s.shard_id, s.position): np.abs(shown - decode_image(s.image)).mean() for s in samples()}
    assert min(error, key=lambda place: error[place]) == (row["shard"], row["position"])
    _, _, small = server.ask(f"api/image?{words(row, size=16)}")
    assert Image.open(io.BytesIO(small)).size == (16, 12)
    for name in ("map", "target"):
        status, _, body = server.ask(f"api/{name}?{words(row)}")
        assert status == 200
        assert json.loads(body[4 : 4 + int.from_bytes(body[:4], "little")])["kind"] == "classes"
    # The labels are the targets, so both have the same pixels.
    assert (
        server.ask(f"api/map?{words(row)}")[2][-64 * 48 * 2 :]
        == server.ask(f"api/target?{words(row)}")[2][-64 * 48 * 2 :]
    )


HOSTS = [
    ("127.0.0.1:{port}", 200), ("localhost:{port}", 200), ("LOCALHOST", 200), ("[::1]:{port}", 200),
    ("evil.example", 421), ("evil.example:{port}", 421), ("127.0.0.1.evil.example", 421), ("10.0.0.7", 421), ("", 421),
    ("127.0.0.1:80@evil.example", 421), ("a b", 421),
]  # fmt: skip


@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_only_its_own_names_are_answered(host: str, status: int, server: Running) -> None:
    """A name of another site that is pointed to this machine (DNS rebinding) is refused before all else."""
    found, _, body = server.ask("api/table", Host=host.format(port=server.port))
    assert found == status
    assert (b"models" in body) is (status == 200)


@pytest.mark.parametrize(
    "path", ["/", "/api/table", f"/{TOKEN}x/", f"/{TOKEN[:-1]}/api/table", "/%00/", "//", f"/x/{TOKEN}/"]
)
def test_without_the_token_there_is_nothing(path: str, server: Running) -> None:
    status, _, body = server.ask(path)
    assert status == 404
    assert b"token" in body
    assert TOKEN.encode() not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"])
def test_get_alone_is_answered(method: str, server: Running) -> None:
    status, headers, _ = server.ask("api/table", method)
    assert (status, headers["allow"]) == (405, "GET")


def test_pages_of_other_sites_get_nothing(server: Running) -> None:
    assert server.ask("api/table", Sec_Fetch_Site="cross-site")[0] == 403
    assert server.ask("api/table", Sec_Fetch_Site="same-site")[0] == 403
    assert server.ask("api/table", Sec_Fetch_Site="same-origin")[0] == 200
    assert server.ask("", Sec_Fetch_Site="cross-site")[0] == 200  # a link to the page


def test_every_answer_has_the_safe_headers(server: Running, row: dict[str, Any]) -> None:
    asked: list[tuple[str, dict[str, str]]] = [
        ("", {}), ("view.js", {}), ("api/table", {}), (f"api/image?{words(row)}", {}), (f"api/map?{words(row)}", {}),
        ("nothing", {}), ("api/row", {}), ("api/table", {"Host": "evil.example"}), ("api/rows?class=x", {}),
    ]  # fmt: skip
    for path, more in asked:
        _, headers, _ = server.ask(path, **more)
        for name, value in HEADERS.items():
            assert headers[name.lower()] == value, path
        assert "access-control-allow-origin" not in headers
        assert "cache-control" in headers


PLACES = ["../../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "scenes/\x00", "", "s" * 5000, "%2e%2e%2f"]


@pytest.mark.parametrize("shard", PLACES, ids=lambda text: repr(text[:20]))
def test_what_no_row_names_is_not_found(shard: str, server: Running, row: dict[str, Any]) -> None:
    for name in ("row", "map", "image", "target"):
        for changed in ({**row, "shard": shard}, {**row, "model": shard}, {**row, "position": 2**31 - 1}):
            status, _, body = server.ask(f"api/{name}?{words(changed)}")
            assert status == 404, name
            assert b"passwd" not in body
    assert server.ask(f"static/{quote(shard)}")[0] == 404
    assert server.ask(f"../../{quote(shard)}")[0] in (400, 404)


@pytest.mark.parametrize(
    "path",
    [
        "api/rows?class=one", "api/rows?count=1000", "api/rows?start=x", "api/rows?start=[1,2,3]", "api/row",
        "api/rows?start=" + "[" * 2000, "api/rows?sort=value", "api/image?shard=a&position=-1", "api/rows?model=x",
        "api/rows?sort=confidence&start=-1", 'api/rows?start=["a",1e9,"b"]', 'api/rows?start=["a",99999999999,"b"]',
    ],
)  # fmt: skip
def test_words_that_are_none_are_refused(path: str, server: Running) -> None:
    assert server.json(quote(path, safe="/?=&[],"), 400)["error"]


def test_pages_end_and_sort(server: Running) -> None:
    found, start = [], ""
    while start is not None:
        answer = server.json(f"api/rows?count=5&start={quote(start)}")
        found += [(one["shard"], one["position"], one["model"]) for one in answer["rows"]]
        start = answer["next"]
    assert len(set(found)) == len(found) == 36
    answer = server.json("api/rows?sort=-confidence&count=100")
    values = [one["confidence"] for one in answer["rows"]]
    assert values == sorted(values, reverse=True)
    assert len(values) + answer["unranked"] == 36
    assert server.json("api/table?fresh=1")["rows"] == 36


def test_an_unexpected_error_says_nothing_of_itself(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("s3cret in /home/somebody")

    monkeypatch.setattr(server.viewer, "rows", broken)
    body = server.json("api/rows", 500)
    assert body == {"error": "unexpected RuntimeError; the terminal has more"}
    assert "s3cret" in caplog.text


def test_a_search_ends_with_whoever_asked(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def slow(_: Any, stop: Stop) -> dict[str, Any]:
        for _ in range(400):
            if stop.cancelled:
                ended.set()
                break
            time.sleep(0.05)
        return {}

    monkeypatch.setattr(server.viewer, "rows", slow)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"GET /{TOKEN}/api/rows HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        time.sleep(0.3)
    assert ended.wait(10)


# Tables that are not whole.


@pytest.mark.parametrize("run", [None, "[]", '{"models": [{"label": "maps", "version": "v1"}]}'])
def test_a_table_without_its_run_is_shown_without_names_and_images(run: str | None, tmp_path: Path) -> None:
    write_table(tmp_path)
    (tmp_path / "run.json").unlink()
    if run is not None:
        (tmp_path / "run.json").write_text(run)
    with running(tmp_path) as server:
        table = server.json("api/table")
        assert "run.json" in table["source"]
        row = server.json("api/rows?model=maps&status=ok")["rows"][0]
        assert server.ask(f"api/map?{words(row)}")[0] == 200
        assert "source" in server.json(f"api/image?{words(row)}", 404)["error"]


def test_images_are_bounded_and_a_source_that_is_gone_says_why(tmp_path: Path) -> None:
    write_table(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    run["config"]["source"]["max_pixels"] = 1000
    (tmp_path / "run.json").write_text(json.dumps(run))
    with running(tmp_path) as server:
        row = server.json("api/rows?model=maps&status=ok")["rows"][0]
        for name in ("image", "map", "target"):
            assert "pixels" in server.json(f"api/{name}?{words(row)}", 422)["error"]
    run["config"]["source"] = {"format": "webdataset", "uri": str(tmp_path / "gone")}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with running(tmp_path) as server:
        row = server.json("api/rows?model=maps&status=ok")["rows"][0]
        assert "gone" in server.json(f"api/image?{words(row)}", 502)["error"]
        assert server.ask(f"api/map?{words(row)}")[0] == 200


def test_a_table_of_another_kind_is_refused(tmp_path: Path) -> None:
    from report_helpers import mixed_rows
    from report_helpers import write_table as write_scores

    uri = write_scores(tmp_path, mixed_rows(1, 4), job="evaluate")
    with pytest.raises(SchemaError, match="no prediction table"):
        Viewer(uri, {})


# The command.


def test_tokens() -> None:
    assert len({new_token() for _ in range(100)}) == 100
    viewer: Any = None
    for token in ("", "short", "a/b" * 10, "ü" * 20, "a" * 65):
        with pytest.raises(ConfigError, match="token"):
            make_app(viewer, token)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.1.2.3", False),
        ("::", False), ("host.example", False),
    ],
)  # fmt: skip
def test_what_is_local(host: str, local: bool) -> None:
    assert is_local(host) is local


def test_the_command_prints_the_address_and_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path)

    async def at_once(app: Any, host: str, port: int, ready: Callable[[int], None], ended: Any) -> None:
        ready(4321)

    monkeypatch.setattr(view, "serve", at_once)
    assert view.main([str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("http://127.0.0.1:4321/")
    assert "warning" not in shown.err
    monkeypatch.setenv(view.TOKEN_VARIABLE, TOKEN)
    assert view.main([str(tmp_path), "--host", "::"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"http://[::]:4321/{TOKEN}/\n"
    assert "warning" in shown.err
    assert view.main([str(tmp_path / "nothing")]) == 4
    assert view.main([str(tmp_path), "--port", "70000"]) == 2
    assert view.main([str(tmp_path), "models=x"]) == 2
    assert "no prediction table" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(tmp_path: Path, server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(tmp_path)
    assert view.main([str(tmp_path), "--port", str(server.port)]) == 2
    assert "cannot listen" in capsys.readouterr().err


def test_other_machines_may_use_its_number_but_no_name(tmp_path: Path) -> None:
    from pipeline.viewer.app import _is_own

    names = {"127.0.0.1", "localhost", "::1", "0.0.0.0"}
    assert _is_own("10.0.0.7:80", names, local=False)
    assert not _is_own("10.0.0.7:80", names, local=True)
    assert not _is_own("evil.example", names, local=False)
