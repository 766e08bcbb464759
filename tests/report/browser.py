"""A headless Chromium that tests drive through its DevTools protocol: load a page, look at it, ask it, click."""

import asyncio
import base64
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

__all__ = ["Browser", "Tab", "find_chromium", "open_browser"]

START_S = 60
ANSWER_S = 60


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome, None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


@contextmanager
def open_browser(profile: Path) -> Iterator["Browser"]:
    """A browser of its own with a fresh profile, ended at the end."""
    arguments = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--mute-audio", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen([str(find_chromium()), *arguments], stdout=log, stderr=log)
    loop = asyncio.new_event_loop()
    try:
        browser = Browser(loop, loop.run_until_complete(_address(process, profile.parent / "chromium.log")))
        loop.run_until_complete(browser.connect())
        yield browser
        loop.run_until_complete(browser.close())
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        loop.close()


async def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    for _ in range(START_S * 10):
        found = re.search(r"DevTools listening on (ws://\S+)", log.read_text("utf-8", "replace"))
        if found:
            return found[1]
        if process.poll() is not None:
            break
        await asyncio.sleep(0.1)
    raise RuntimeError(f"Chromium did not start: {log.read_text('utf-8', 'replace')[-2000:]}")


class Browser:
    """The connection. Use `tab`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, address: str) -> None:
        self.loop = loop
        self._address = address
        self._number = 0
        self.events: list[dict[str, Any]] = []

    async def connect(self) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(self._address, max_msg_size=0)

    async def close(self) -> None:
        await self._socket.close()
        await self._session.close()

    async def ask(self, method: str, session: str | None, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        await self._socket.send_json(message)
        while True:
            answer = await self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self.events.append(answer)

    async def wait(self, method: str) -> None:
        """Until this event came, since the last time that it was waited for."""
        while True:
            for at, event in enumerate(self.events):
                if event.get("method") == method:
                    del self.events[at]
                    return
            self.events.append(await self._next())

    async def _next(self) -> dict[str, Any]:
        return dict(await asyncio.wait_for(self._socket.receive_json(), ANSWER_S))

    @contextmanager
    def tab(
        self, url: str, *, width: int, height: int = 900, dark: bool = False, phone: bool = False
    ) -> Iterator["Tab"]:
        """A page that has loaded, at a width in CSS pixels."""
        self.events.clear()
        target = self.loop.run_until_complete(self.ask("Target.createTarget", None, {"url": "about:blank"}))["targetId"]
        attach = {"targetId": target, "flatten": True}
        session = self.loop.run_until_complete(self.ask("Target.attachToTarget", None, attach))["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.ask(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        tab.ask("Emulation.setEmulatedMedia", media="", features=scheme)
        tab.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        tab.ask("Page.navigate", url=url)
        self.loop.run_until_complete(self.wait("Page.loadEventFired"))
        try:
            yield tab
        finally:
            self.loop.run_until_complete(self.ask("Target.closeTarget", None, {"targetId": target}))


class Tab:
    """One loaded page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.loop.run_until_complete(self._browser.ask(method, self._session, parameters))

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page; the page's own policy does not hold for it."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, *, whole: bool = True) -> bytes:
        """A PNG of the whole page, or of what is in view."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def pdf(self) -> bytes:
        return base64.b64decode(self.ask("Page.printToPDF", printBackground=True)["data"])

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, of scripts and of the policy."""
        self.evaluate("1")
        found = []
        for event in self._browser.events:
            method, details = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(details["exceptionDetails"]))
            if method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
                found.append(str(details["args"]))
            if method == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
                found.append(str(details["entry"]))
        return found

    def blocked(self) -> list[str]:
        """Which of `requests` the page's policy refused."""
        urls = {}
        for event in self._browser.events:
            if event.get("method") == "Network.requestWillBeSent":
                urls[event["params"]["requestId"]] = event["params"]["request"]["url"]
        failed = (e["params"] for e in self._browser.events if e.get("method") == "Network.loadingFailed")
        return [urls[params["requestId"]] for params in failed if params.get("blockedReason") == "csp"]

    def requests(self) -> list[str]:
        """What was asked for beside the page itself and data in it, refused or not."""
        self.evaluate("1")
        urls = [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in urls[1:] if not url.startswith("data:")]
