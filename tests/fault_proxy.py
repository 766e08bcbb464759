"""An HTTP proxy on 127.0.0.1 in front of a server, with faults of one's choice: for tests of storage that fails.

with FaultProxy("http://127.0.0.1:5000") as proxy:
    proxy.faults.append(Fault(method="PUT", path=r"/step-0+6-", what="reset", times=2))
    ...                                     # clients use proxy.uri
    assert proxy.outcomes("PUT", "/step-0+6-") == ["reset", "reset", 200]
"""

import asyncio
import random
import re
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp
from aiohttp import web
from yarl import URL

__all__ = ["Fault", "FaultProxy", "Request"]

# Of the connection, which each side has its own of.
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "upgrade"}
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
START_TIMEOUT_S = 20.0


@dataclass(eq=False, kw_only=True)
class Fault:
    """What happens to some of the requests.

    method, path: regular expressions; the whole method, and anywhere in the path with its query, as it was sent.
    skip, times: so many of those go through first, then so many fail; None is all that come.
    share: of those that may fail so many do, drawn from `chance`.
    what: `status` answers with `status` and `body`, `reset` cuts the connection, `stall` lets `seconds` pass before
        that, `cut` ends the server's answer in its middle, `hold` waits until `released` is set and goes on as usual,
        `stale` gives a listing as it was when it was asked for before.
    forwarded: the server gets the request, and it is its answer that is lost.
    reached: set when the fault happens for the first time. happened: how often it did.
    """

    method: str = ".*"
    path: str = ""
    skip: int = 0
    times: int | None = None
    share: float = 1.0
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    what: Literal["status", "reset", "stall", "cut", "hold", "stale"] = "status"
    status: int = 503
    body: bytes = SLOW_DOWN
    seconds: float = 30.0
    forwarded: bool = False
    seen: int = 0
    happened: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def takes(self, method: str, path: str) -> bool:
        """Whether it happens to this request, which is counted."""
        if not (re.fullmatch(self.method, method) and re.search(self.path, path)):
            return False
        self.seen += 1
        happens = self.seen > self.skip and (self.times is None or self.happened < self.times)
        happens = happens and (self.share >= 1 or self.chance.random() < self.share)
        if happens:
            self.happened += 1
            self.reached.set()
        return happens


@dataclass(frozen=True)
class Request:
    """A request that came. outcome: the status that was answered, or the fault that was not an answer. agent: what the
    client calls itself."""

    method: str
    path: str
    outcome: int | str
    agent: str


class FaultProxy:
    """A context manager; its server runs in a thread. faults: the first that takes a request counts; change the list at
    any time. requests: what came, as it was answered. uri: where it listens."""

    def __init__(self, target: str) -> None:
        self.target = target.rstrip("/")
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.uri = ""
        self._listings: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT_S):
            raise RuntimeError("the proxy did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fault in self.faults:
            fault.released.set()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_TIMEOUT_S)

    def outcomes(self, method: str, path: str) -> list[int | str]:
        """What happened to the requests of this method whose path has this pattern."""
        return [item.outcome for item in self.requests if item.method == method and re.search(path, item.path)]

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        left = asyncio.all_tasks(self._loop)  # requests that still stall
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    async def _serve(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
            runner = web.ServerRunner(web.Server(lambda request: self._answer(request, session)), shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            self.uri = f"http://{host}:{port}"
            self._ready.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _answer(self, request: web.BaseRequest, session: aiohttp.ClientSession) -> web.StreamResponse:
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        body = await request.content.read()
        fault = next((item for item in self.faults if item.takes(request.method, request.raw_path)), None)
        if fault is not None and fault.what == "hold":
            while not fault.released.is_set():
                await asyncio.sleep(0.01)
            fault = None
        if fault is not None and fault.what == "stale":
            if request.raw_path in self._listings:
                status, headers, data = self._listings[request.raw_path]
                self._note(request, fault.what)
                return web.Response(status=status, headers=headers, body=data)
            fault.happened -= 1
            fault = None
        if fault is not None and fault.what != "cut":
            if fault.forwarded:
                await self._forward(request, body, session)
            self._note(request, fault.status if fault.what == "status" else fault.what)
            if fault.what == "status":
                return web.Response(status=fault.status, body=fault.body, content_type="application/xml")
            if fault.what == "stall":
                await asyncio.sleep(fault.seconds)
            return _reset(request)
        status, headers, data = await self._forward(request, body, session)
        if request.method == "GET" and "list-type" in request.query:
            self._listings[request.raw_path] = status, headers, data
        self._note(request, status if fault is None else fault.what)
        if fault is None:
            return web.Response(status=status, headers=headers, body=data)
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = len(data)
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        return _reset(request)

    def _note(self, request: web.BaseRequest, outcome: int | str) -> None:
        self.requests.append(Request(request.method, request.raw_path, outcome, request.headers.get("User-Agent", "")))

    async def _forward(
        self, request: web.BaseRequest, body: bytes, session: aiohttp.ClientSession
    ) -> tuple[int, dict[str, str], bytes]:
        url = URL(self.target + request.raw_path, encoded=True)
        async with session.request(request.method, url, headers=_kept(request.headers), data=body) as answer:
            data = await answer.read()
            headers = _kept(answer.headers)
            if request.method == "HEAD" and "Content-Length" in answer.headers:
                headers["Content-Length"] = answer.headers["Content-Length"]
            return answer.status, headers, data


def _kept(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in HOP_HEADERS}


def _reset(request: web.BaseRequest) -> web.StreamResponse:
    """End the connection here and now."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
