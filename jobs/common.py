"""What all jobs share: arguments, help from the config's own fields, errors as one line and an exit code."""

import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pipeline.config import Section
from pipeline.configfile import describe, load_config, load_overrides
from pipeline.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_UNEXPECTED, ConfigError, MaskmillError, RunError
from pipeline.printable import PlainFormatter, printable, printable_log
from pipeline.redaction import redact_text

__all__ = ["Interrupted", "config_help", "config_job", "guarded", "storage_options"]

ConfigT = TypeVar("ConfigT", bound=Section)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM."""


def config_help(job: str, kind: type[Section]) -> str:
    """Usage and every config field with its default and meaning."""
    summary = (kind.__doc__ or "").strip()
    lines = [f"usage: maskmill {job} CONFIG.yaml [dotted.key=value ...]", "", summary, "", "Fields:"]
    for name, default, meaning in describe(kind):
        lines.append(f"  {name}  ({default})" if default != "required" else f"  {name}  (required)")
        lines += textwrap.wrap(meaning, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def config_job(job: str, kind: type[ConfigT], body: Callable[[ConfigT], int], argv: Sequence[str]) -> int:
    """Run a job that takes a config and overrides."""
    if not argv or argv[0] in ("-h", "--help"):
        return guarded(lambda: _print(config_help(job, kind))) or (0 if argv else EXIT_CONFIG)
    uri, overrides = (None, argv) if "=" in argv[0] else (argv[0], argv[1:])
    return guarded(lambda: body(load_config(kind, uri, overrides)))


def _print(text: str) -> int:
    print(text, flush=True)
    return 0


def guarded(body: Callable[[], int]) -> int:
    """Run a job's body; errors become one line on standard error and an exit code."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("maskmill: %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        return body()
    except RunError as error:
        return fail(str(error), error.exit_code)
    except MaskmillError as error:
        return fail(str(error), EXIT_UNEXPECTED)
    except KeyboardInterrupt:
        return fail("interrupted; what is committed stays, the same command goes on from there", EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # noqa: BLE001  (Python would print the same, with whatever credentials the message holds)
        print(printable_log(redact_text(traceback.format_exc())), end="", file=sys.stderr)
        return EXIT_UNEXPECTED


def fail(text: str, code: int) -> int:
    """Say what went wrong in one line, without credentials and control characters."""
    print(printable(redact_text(f"maskmill: error: {' '.join(text.split())}")), file=sys.stderr)
    return code


def storage_options(overrides: Sequence[str]) -> dict[str, Any]:
    """`storage.key=value` arguments as fsspec options. Raises ConfigError."""
    tree = load_overrides(overrides)
    unknown = sorted(set(tree) - {"storage"})
    if unknown:
        raise ConfigError(f"expected storage.key=value, got {unknown[0]!r}")
    options: dict[str, Any] = tree.get("storage", {})
    return options
