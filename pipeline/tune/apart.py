"""Measuring in a process of its own, which a crash, an exhausted memory or a setting that never ends takes with it."""

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from pipeline.config import LabelConfig
from pipeline.errors import MaskmillError, RunError, StorageError
from pipeline.sources.base import Unit
from pipeline.tune.measure import Tuner
from pipeline.tune.search import Failed, Outcome
from pipeline.tune.settings import Context, Setting

__all__ = ["Apart"]

END_S = 10.0


class Apart:
    """A Tuner elsewhere. A context manager; where its process ends, the next call starts another."""

    def __init__(
        self, config: LabelConfig, model: int, units: Sequence[Unit], *, images: int, seed: int, limit_s: float
    ) -> None:
        """limit_s: of one setting. The others: as `Tuner` takes them."""
        self._given = (config, model, list(units), images, seed)
        self._limit_s = limit_s
        self._process: SpawnProcess | None = None
        self._connection: Connection[Any, Any] | None = None

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def start(self) -> Setting:
        """The fp32 setting."""
        return Setting().with_options(precision="fp32")

    def context(self) -> Context:
        """Raises what `Tuner` and its `context` raise, StorageError where its process ends."""
        found = self._ask("context")
        if isinstance(found, Failed):
            raise StorageError(f"the model cannot be looked at: {found.reason}")
        return found  # type: ignore[no-any-return]

    def measure(self, setting: Setting) -> Outcome:
        """As `Tuner.measure`. A process that ends or takes too long is a Failed."""
        return self._ask("measure", setting)  # type: ignore[no-any-return]

    def budget(self, setting: Setting) -> int | None:
        """As `Tuner.budget`."""
        found = self._ask("budget", setting)
        return None if isinstance(found, Failed) else found

    def _ask(self, name: str, *arguments: Any) -> Any:
        connection = self._connection or self._begin()
        try:
            connection.send((name, arguments))
            if not connection.poll(self._limit_s):
                self._end()
                return Failed(f"no end within {self._limit_s:g} s")
            answer = connection.recv()
        except (EOFError, OSError):
            code = self._end()
            killed = ", as by the system when memory ran out" if code == -9 else ""
            return Failed(f"its process ended ({f'signal {-code}' if code and code < 0 else f'exit {code}'}){killed}")
        if isinstance(answer, RunError):
            raise answer
        return answer

    def _begin(self) -> "Connection[Any, Any]":
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, *self._given), daemon=True)
        self._process.start()
        there.close()
        self._connection = here
        return here

    def _end(self) -> int | None:
        """End the process; its exit code."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is None:
            return None
        process.join(1.0)
        if process.is_alive():
            process.terminate()
            process.join(END_S)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode


def _serve(
    connection: "Connection[Any, Any]", config: LabelConfig, model: int, units: list[Unit], images: int, seed: int
) -> None:
    """Answer calls of a Tuner's methods until the other end is closed."""
    tuner: Tuner | None = None
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            tuner = tuner or Tuner(config, model, units, images=images, seed=seed)
            connection.send(getattr(tuner, name)(*arguments))
        except MaskmillError as error:
            connection.send(error if isinstance(error, RunError) else Failed(f"{type(error).__name__}: {error}"))
