"""A folder as a bucket on this machine, behind a server that lets some time pass before each answer."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from pipeline.models.extras import import_extra

__all__ = ["delayed", "served"]

BUCKET = "bench"
CREDENTIALS = {"key": "bench", "secret": "bench"}  # of a server that asks for any
WsgiApplication = Callable[[dict[str, Any], Any], Iterable[bytes]]


def delayed(application: WsgiApplication, latency_s: float) -> WsgiApplication:
    """The application, `latency_s` later."""

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        time.sleep(latency_s)
        return application(environ, start_response)

    return answer


@contextlib.contextmanager
def served(folder: Path, latency_s: float) -> Iterator[dict[str, Any]]:
    """A source section (uri, storage) with the files of `folder`, while the context lasts. Raises ConfigError without
    the extra."""
    moto = import_extra("moto.server", "peers")
    werkzeug = import_extra("werkzeug.serving", "peers")
    waiting = {"s": 0.0}

    def patient(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return delayed(application, waiting["s"])(environ, start_response)

    application = moto.DomainDispatcherApplication(moto.create_backend_app)

    class Quiet(werkzeug.WSGIRequestHandler):  # type: ignore[misc, name-defined]
        def log_request(self, *_: object) -> None:
            """A line for each request would be most of what a benchmark prints."""

    server = werkzeug.make_server("127.0.0.1", 0, patient, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    storage = {
        **CREDENTIALS,
        "endpoint_url": f"http://127.0.0.1:{server.server_port}",
        "client_kwargs": {"region_name": "us-west-2"},
    }
    try:
        fs = fsspec.filesystem("s3", **storage)
        fs.mkdir(BUCKET)
        for path in sorted(folder.iterdir()):
            if path.suffix != ".part":
                fs.put_file(str(path), f"{BUCKET}/{path.name}")
        waiting["s"] = latency_s
        yield {"uri": f"s3://{BUCKET}", "storage": storage}
    finally:
        server.shutdown()
        thread.join()
