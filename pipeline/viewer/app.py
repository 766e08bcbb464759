"""The viewer over HTTP: who may ask, how answers are sent, and the page itself. What is answered is viewer.py's.

The server is for one person on one machine. It listens on this machine alone, answers to its own names only, so that a
page of another site whose name is pointed here (DNS rebinding) gets nothing, and every address begins with a random
token, so that other people of the machine get nothing either. It knows GET alone and changes nothing.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import secrets
import socket
import zlib
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

from aiohttp import web

from pipeline.errors import ConfigError, MaskmillError, RowError
from pipeline.printable import printable
from pipeline.redaction import redact_text
from pipeline.viewer.scan import Stop
from pipeline.viewer.viewer import SEARCH_S, MissingError, Viewer

__all__ = ["POLICY", "is_local", "make_app", "new_token", "serve"]

log = logging.getLogger(__name__)

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "maskmill",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
PAGE = {"": ("index.html", "text/html"), "view.js": ("view.js", "text/javascript"),
        "draw.js": ("draw.js", "text/javascript"), "view.css": ("view.css", "text/css"),
        "icon.svg": ("icon.svg", "image/svg+xml")}  # fmt: skip
# What a row holds does not change, and the address with its token is never used again.
KEPT = "private, max-age=3600"
TOKEN = re.compile(r"[A-Za-z0-9_-]{16,64}")
SHORTEST_ZIPPED = 1000
# Decoding holds the other half of the machine; searches must not wait for it.
DECODERS, SEARCHERS = 4, 3
VIEWER = web.AppKey("viewer", Viewer)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def new_token() -> str:
    """A word that nobody guesses."""
    return secrets.token_urlsafe(18)


def is_local(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_app(viewer: Viewer, token: str, host: str = "127.0.0.1") -> web.Application:
    """The application under /TOKEN/. host: where it is to listen. Raises ConfigError for a token that is easy to guess
    or no part of an address."""
    if not TOKEN.fullmatch(token):
        raise ConfigError("the token must have 16 to 64 letters, digits, - or _")
    app = web.Application(middlewares=[_answer_safely, _guard(token, host)], client_max_size=1024)
    app[VIEWER] = viewer
    decoders, searchers = ThreadPoolExecutor(DECODERS, "decode"), ThreadPoolExecutor(SEARCHERS, "search")

    async def stop(app: web.Application) -> None:
        viewer.close()
        for pool in (decoders, searchers):
            pool.shutdown(wait=False, cancel_futures=True)

    app.on_shutdown.append(stop)

    async def table(request: web.Request) -> web.Response:
        fresh = request.query.get("fresh") == "1"
        return _json(await _in(searchers, lambda: viewer.table(fresh=fresh)))

    async def rows(request: web.Request) -> web.Response:
        words = dict(request.query)
        search = Stop(SEARCH_S)
        try:
            return _json(await _in(searchers, lambda: viewer.rows(words, search)))
        except asyncio.CancelledError:  # the page has asked for something else
            search.cancel()
            raise

    async def row(request: web.Request) -> web.Response:
        words = dict(request.query)
        return _json(await _in(searchers, lambda: viewer.row(words)))

    async def image(request: web.Request) -> web.Response:
        words = dict(request.query)
        data, width, height = await _in(decoders, lambda: viewer.image(words))
        size = {"X-Image-Size": f"{width} {height}", "Cache-Control": KEPT}
        return web.Response(body=data, content_type="image/jpeg", headers=size)

    def pixels(read: Callable[[Mapping[str, str]], bytes]) -> Handler:
        async def handler(request: web.Request) -> web.Response:
            words = dict(request.query)
            data = await _in(decoders, lambda: zlib.compress(read(words), 1))
            kept = {"Content-Encoding": "deflate", "Cache-Control": KEPT}
            return web.Response(body=data, content_type="application/octet-stream", headers=kept)

        return handler

    base = f"/{token}/"
    for name, (file, kind) in PAGE.items():
        app.router.add_get(base + name, _static(file, kind), allow_head=False)
    for name, handler in (
        ("table", table), ("rows", rows), ("row", row), ("image", image),
        ("map", pixels(viewer.pixels)), ("target", pixels(viewer.target)),
    ):  # fmt: skip
        app.router.add_get(f"{base}api/{name}", handler, allow_head=False)
    return app


def _static(file: str, kind: str) -> Handler:
    """A file of the package, read once; no name of a request is a path."""
    text = (resources.files("pipeline.viewer") / "page" / file).read_text("utf-8")

    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=text, content_type=kind, charset="utf-8", headers={"Cache-Control": "no-cache"})

    return handler


def _guard(token: str, host: str) -> Any:
    names = {"127.0.0.1", "localhost", "::1", host.lower(), socket.gethostname().lower()}

    @web.middleware  # type: ignore[untyped-decorator]
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not _is_own(request.headers.get("Host", ""), names, is_local(host)):
            raise web.HTTPMisdirectedRequest(text="this server does not answer to that name")
        given = request.path.split("/")[1] if request.path.startswith("/") else ""
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise web.HTTPNotFound(text="open the address that `maskmill view` has printed: it begins with a token")
        if request.method != "GET":
            raise web.HTTPMethodNotAllowed(request.method, ["GET"], text="only GET is answered")
        is_page = request.path == f"/{token}/"
        if not is_page and request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise web.HTTPForbidden(text="this is not for pages of other sites")
        return await handler(request)

    return guard


def _is_own(header: str, names: set[str], local: bool) -> bool:
    """Whether a Host header names this server; beyond this machine, any address in numbers does, which no site's name
    can be pointed to."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]/@]+))(?::\d{1,5})?", header)
    if found is None:
        return False
    name = (found[1] or found[2]).lower()
    if name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return not local


@web.middleware  # type: ignore[untyped-decorator]
async def _answer_safely(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every answer with HEADERS, every error as JSON without what is nobody's business."""
    try:
        response = await handler(request)
    except web.HTTPException as error:
        response = _refusal(error.status, error.text or "")
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    except MissingError as error:
        response = _refusal(404, str(error))
    except ConfigError as error:
        response = _refusal(400, str(error))
    except RowError as error:
        response = _refusal(422, str(error))
    except MaskmillError as error:
        response = _refusal(502, str(error))
    except Exception as error:
        log.exception("unexpected error")
        response = _refusal(500, f"unexpected {type(error).__name__}; the terminal has more")
    for name, value in HEADERS.items():
        response.headers[name] = value
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def _refusal(status: int, text: str) -> web.Response:
    return _json({"error": printable(" ".join(redact_text(text).split()))[:1000]}, status)


def _json(value: Any, status: int = 200) -> web.Response:
    # Not read as a page by any browser, but `<` may as well not be there.
    text = json.dumps(value, allow_nan=False).replace("<", "\\u003c")
    response = web.Response(text=text, status=status, content_type="application/json")
    if len(text) > SHORTEST_ZIPPED:
        response.enable_compression(web.ContentCoding.deflate)
    return response


async def _in(pool: ThreadPoolExecutor, call: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(pool, call)


async def serve(app: web.Application, host: str, port: int, ready: Callable[[int], None], ended: asyncio.Event) -> None:
    """Listen until `ended`. ready: told the port once it answers. Raises ConfigError where it cannot listen."""
    # A page that asks for something else closes its request: the search for it ends.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
        ready(runner.addresses[0][1])
        await ended.wait()
    finally:
        await runner.cleanup()
