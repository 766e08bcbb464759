"""Where to look in an image, as its sample says it: one JSON document of boxes, points and words.

    {"boxes": [[x1, y1, x2, y2], ...], "points": [[x, y, 1], ...], "text": "a red car"}

All in pixels of the decoded image; what is not needed is left out.
"""

import json
import math
from typing import Any

from pipeline.errors import TargetMismatchError
from pipeline.models.spec import Prompts

__all__ = ["read_prompts"]

MAX_BYTES = 4_000_000
MAX_BOXES = 10_000
MAX_POINTS = 1_000
MAX_TEXT = 2_000
# Far outside of any image: what is beyond is a mistake, and no float of a model holds it exactly.
MAX_COORDINATE = 1_000_000


def read_prompts(data: bytes) -> Prompts:
    """The prompts of one image. Raises TargetMismatchError for a document that is too long or says anything else.

    A box needs x1 < x2 and y1 < y2; it may leave the image. A point ends in 1 (inside) or 0 (outside).
    """
    if len(data) > MAX_BYTES:
        raise TargetMismatchError(f"prompts: expected at most {MAX_BYTES} bytes of JSON, got {len(data)}")
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TargetMismatchError(f"prompts are no JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(tree, dict):
        raise TargetMismatchError(f"prompts: expected an object, got {_shown(tree)}")
    unknown = sorted(tree.keys() - {"boxes", "points", "text"})
    if unknown:
        raise TargetMismatchError(f"prompts: expected boxes, points and text, got {_shown(unknown[0])}")
    boxes = _rows(tree, "boxes", 4, MAX_BOXES, "x1, y1, x2, y2")
    for place, (x1, y1, x2, y2) in enumerate(boxes):
        if not (x1 < x2 and y1 < y2):
            raise TargetMismatchError(f"prompts.boxes[{place}]: expected x1 < x2 and y1 < y2, got {x1, y1, x2, y2}")
    points = _rows(tree, "points", 3, MAX_POINTS, "x, y and 1 or 0")
    for place, (_, _, inside) in enumerate(points):
        if inside not in (0, 1):
            raise TargetMismatchError(f"prompts.points[{place}]: expected 1 (inside) or 0 (outside), got {inside}")
    text = tree.get("text", "")
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise TargetMismatchError(f"prompts.text: expected at most {MAX_TEXT} characters, got {_shown(text)}")
    return Prompts(
        boxes=tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in boxes),
        points=tuple((x, y, int(inside)) for x, y, inside in points),
        text=text,
    )


def _rows(tree: dict[str, Any], name: str, length: int, most: int, meaning: str) -> list[list[float]]:
    rows = tree.get(name, [])
    if not isinstance(rows, list) or len(rows) > most:
        got = f"{len(rows)} of them" if isinstance(rows, list) else _shown(rows)
        raise TargetMismatchError(f"prompts.{name}: expected a list of at most {most}, got {got}")
    return [_row(row, length, f"prompts.{name}[{place}]: expected {meaning}") for place, row in enumerate(rows)]


def _row(row: Any, length: int, expected: str) -> list[float]:
    if not isinstance(row, list) or len(row) != length:
        raise TargetMismatchError(f"{expected}, got {_shown(row)}")
    for value in row:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or abs(value) > MAX_COORDINATE or math.isnan(value):
            raise TargetMismatchError(f"{expected} from -{MAX_COORDINATE} to {MAX_COORDINATE}, got {_shown(value)}")
    return [float(value) for value in row]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
