"""Libraries that only some models need, imported when one of them is built."""

import importlib
from typing import Any

from pipeline.errors import ConfigError

__all__ = ["import_extra"]


def import_extra(module: str, extra: str) -> Any:
    """The module, which comes with an extra of this package. Raises ConfigError that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f'it needs pip install "maskmill[{extra}]": cannot import {module}: {text}') from error
