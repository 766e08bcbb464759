"""Browse a table of masks in a browser: `maskmill view OUTPUT [--port N]`, a page on this machine."""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from jobs.common import guarded
from pipeline.config import LabelConfig
from pipeline.configfile import load_config, load_overrides
from pipeline.errors import ConfigError
from pipeline.printable import printable
from pipeline.viewer.app import is_local, make_app, new_token, serve
from pipeline.viewer.viewer import Viewer

__all__ = ["main"]

LOCAL = "127.0.0.1"
# Not an option: what stands on a command line every user of the machine can read.
TOKEN_VARIABLE = "MASKMILL_VIEW_TOKEN"  # noqa: S105  (the name of a variable)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        "maskmill view",
        description="serve a page on this machine that shows a table's images under their masks; nothing is changed",
        epilog=f"Links outlive a restart with --port and a fixed token in the variable {TOKEN_VARIABLE}.",
    )
    parser.add_argument("output", help="output.uri of a label run")
    parser.add_argument("--port", type=int, default=0, help="port (default: a free one)")
    parser.add_argument(
        "--host", default=LOCAL, help=f"address to listen on (default {LOCAL}); any other lets other machines in"
    )
    parser.add_argument("--config", help="the run's config, for the storage options that run.json does not keep")
    parser.add_argument(
        "overrides", nargs="*", help="source.storage.key=value, output.storage.key=value, source.uri=..."
    )
    arguments = parser.parse_intermixed_args(argv)
    return guarded(lambda: _view(arguments))


def _view(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.port <= 65535:
        raise ConfigError(f"--port must be 0 to 65535, got {arguments.port}")
    if arguments.config:
        config = load_config(LabelConfig, arguments.config, arguments.overrides)
        viewer = Viewer(arguments.output, config.output.storage, config.source)
    else:
        tree = load_overrides(arguments.overrides)
        unknown = sorted(tree.keys() - {"output", "source"})
        if unknown:
            raise ConfigError(f"expected source.key=value or output.storage.key=value, got {unknown[0]!r}")
        storage: dict[str, Any] = tree.get("output", {}).get("storage", {})
        viewer = Viewer(arguments.output, storage, tree.get("source", {}))
    try:
        return asyncio.run(_serve(viewer, arguments))
    finally:
        viewer.close()


async def _serve(viewer: Viewer, arguments: argparse.Namespace) -> int:
    token = os.environ.get(TOKEN_VARIABLE) or new_token()
    host = arguments.host
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)

    def ready(port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port}/{token}/", flush=True)
        print(printable(f"maskmill: showing {arguments.output} until Ctrl-C"), file=sys.stderr, flush=True)

    if not is_local(host):
        print(
            printable(
                f"maskmill: warning: {host} is reached from other machines. Whoever has the address below sees the "
                "images and masks, and so does whoever listens on the network: nothing is encrypted. Without --host, "
                "`ssh -L PORT:127.0.0.1:PORT` brings the page to another machine safely."
            ),
            file=sys.stderr,
        )
    await serve(make_app(viewer, token, host), host, arguments.port, ready, ended)
    return 0


if __name__ == "__main__":
    sys.exit(main())
