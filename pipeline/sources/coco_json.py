"""COCO annotation files, element by element: the text of each annotation by image, without the whole as objects."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import ConfigError

__all__ = ["read_coco"]

SPACE = re.compile(r"[ \t\r\n]*")
NAMES = {int: "a number", str: "a string", list: "a list"}


class _Cursor:
    """A place in JSON text. Raises ConfigError where the text is not as expected."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where, self.at = text, where, 0
        self._decoder = json.JSONDecoder()

    def space(self) -> str:
        """The next character that is not space, empty at the end."""
        match = SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.text[self.at : self.at + 1]

    def expect(self, characters: str) -> str:
        found = self.space()
        if not found or found not in characters:
            raise ConfigError(
                f"{self.where} is not JSON: expected {' or '.join(characters)} at character {self.at}, "
                f"got {found or 'the end'!r}"
            )
        self.at += 1
        return found

    def value(self) -> Any:
        self.space()
        try:
            value, self.at = self._decoder.raw_decode(self.text, self.at)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.where} is not JSON: {error}") from error
        return value

    def items(self, close: str) -> Iterator[int]:
        """Stops at each element of a list or object that was just opened; gives their ordinal."""
        if self.space() == close:
            self.at += 1
            return
        index = 0
        while True:
            yield index
            index += 1
            if self.expect("," + close) == close:
                return


def read_coco(data: bytes, where: str, needed: Mapping[str, type]) -> Iterator[tuple[str, str, list[str]]]:
    """(file_name, id, annotations as JSON text) of each image; annotations of images it does not list are left out.

    needed: what an annotation must have besides `image_id`. Raises ConfigError where the file is not what COCO
    describes, or names an image twice.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8: {error}") from error
    cursor = _Cursor(text, where)
    if cursor.space() == "[":
        raise ConfigError(f"{where}: expected an object with images and annotations, got a list (a results file?)")
    cursor.expect("{")
    images: dict[int | str, str] = {}
    spans: dict[int | str, list[tuple[int, int]]] = {}
    names: set[str] = set()
    found = set()
    for _ in cursor.items("}"):
        key = cursor.value()
        cursor.expect(":")
        if key not in ("images", "annotations"):
            cursor.value()
            continue
        found.add(key)
        if cursor.space() != "[":
            raise ConfigError(f"{where}: {key} must be a list")
        cursor.at += 1
        for index in cursor.items("]"):
            cursor.space()
            start = cursor.at
            element = cursor.value()
            place = f"{where}: {key}[{index}]"
            if key == "images":
                _add_image(images, names, element, place)
            else:
                owner = _field(element, "image_id", (int, str), place)
                for name, kind in needed.items():
                    _field(element, name, (kind,), place)
                spans.setdefault(owner, []).append((start, cursor.at))
    if len(found) < 2:
        lacking = ", ".join({"images", "annotations"} - found)
        raise ConfigError(f"{where}: expected an object with images and annotations, it lacks {lacking}")
    for number, name in images.items():
        yield name, str(number), [text[start:end] for start, end in spans.get(number, ())]


def _add_image(images: dict[int | str, str], names: set[str], element: Any, place: str) -> None:
    number = _field(element, "id", (int, str), place)
    name = _field(element, "file_name", (str,), place)
    if number in images:
        raise ConfigError(f"{place}: the id {number!r} occurs twice")
    if name in names:
        raise ConfigError(f"{place}: the file_name {name!r} occurs twice")
    names.add(name)
    images[number] = name


def _field(element: Any, name: str, kinds: tuple[type, ...], place: str) -> Any:
    if not isinstance(element, dict):
        raise ConfigError(f"{place} must be an object, got {type(element).__name__}")
    value = element.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(NAMES[kind] for kind in kinds)
        got = (
            f"got {type(value).__name__}" if name in element else f"it has {', '.join(map(str, element)) or 'nothing'}"
        )
        raise ConfigError(f"{place}: {name} must be {wanted}, {got}"[:500])
    return value
