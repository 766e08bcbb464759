"""COCO files, element by element: the text of each annotation by image, without the whole as objects."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import ConfigError

__all__ = ["CocoImage", "check_field", "read_categories", "read_coco", "read_elements"]

SPACE = re.compile(r"[ \t\r\n]*")
NAMES = {int: "a number", float: "a number", str: "a string", list: "a list"}


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One of `images` with its annotations as JSON text. width, height: pixels, 0 where the file does not say."""

    id: str
    file_name: str
    width: int
    height: int
    annotations: tuple[str, ...] = ()


class _Cursor:
    """A place in JSON text. Raises ConfigError where the text is not as expected."""

    def __init__(self, data: bytes, where: str) -> None:
        try:
            self.text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where} is not UTF-8: {error}") from error
        self.where, self.at = where, 0
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

    def elements(self, name: str) -> Iterator[tuple[str, int, Any]]:
        """Of each element of the list that begins here: what to call it, where its text starts (it ends at `at`), and
        its value."""
        self.expect("[")
        for index in self.items("]"):
            self.space()
            start = self.at
            value = self.value()
            yield f"{self.where}: {name}[{index}]", start, value

    def lists(self, *names: str) -> Iterator[str]:
        """Stops at each list of these names in the object that begins here, to be read; passes over all else."""
        self.expect("{")
        for _ in self.items("}"):
            key = self.value()
            self.expect(":")
            opens_list = self.space() == "["
            if key in names:
                if not opens_list:
                    raise ConfigError(f"{self.where}: {key} must be a list")
                yield key
            elif opens_list:
                for _ in self.elements(""):  # never whole in memory: it may be all annotations
                    pass
            else:
                self.value()


def read_coco(data: bytes, where: str, needed: Mapping[str, type]) -> Iterator[CocoImage]:
    """The images of a file with their annotations; annotations of images that it does not list are left out. Ids are
    compared as text.

    needed: what an annotation must have besides `image_id`. Raises ConfigError where the file is not what COCO
    describes, or names an image twice.
    """
    cursor = _Cursor(data, where)
    if cursor.space() == "[":
        raise ConfigError(f"{where}: expected an object with images and annotations, got a list (a results file?)")
    images: dict[str, CocoImage] = {}
    spans: dict[str, list[tuple[int, int]]] = {}
    names: set[str] = set()
    found = set()
    for key in cursor.lists("images", "annotations"):
        found.add(key)
        for place, start, element in cursor.elements(key):
            if key == "annotations":
                owner = check_field(element, "image_id", (int, str), place)
                for name, kind in needed.items():
                    check_field(element, name, (kind,), place)
                spans.setdefault(str(owner), []).append((start, cursor.at))
                continue
            image = _image(element, place)
            if image.id in images:
                raise ConfigError(f"{place}: the id {element['id']!r} occurs twice")
            if image.file_name in names:
                raise ConfigError(f"{place}: the file_name {image.file_name!r} occurs twice")
            names.add(image.file_name)
            images[image.id] = image
    if len(found) < 2:
        lacking = ", ".join({"images", "annotations"} - found)
        raise ConfigError(f"{where}: expected an object with images and annotations, it lacks {lacking}")
    for image in images.values():
        yield replace(image, annotations=tuple(cursor.text[start:end] for start, end in spans.get(image.id, ())))


def read_categories(data: bytes, where: str) -> Iterator[Mapping[str, Any]]:
    """The file's `categories`, each with an id and a name of its own. Raises ConfigError."""
    cursor = _Cursor(data, where)
    seen: set[int] = set()
    for key in cursor.lists("categories"):
        for place, _, element in cursor.elements(key):
            number = check_field(element, "id", (int,), place)
            check_field(element, "name", (str,), place)
            if number in seen:
                raise ConfigError(f"{place}: the id {number} occurs twice")
            seen.add(number)
            yield element


def read_elements(data: bytes, where: str, *, name: str) -> Iterator[tuple[str, str, Any]]:
    """What to call each annotation of a file, its JSON text and its value.

    The file is a list of them, which `name` names in messages, or an object that has them as `annotations`. Raises
    ConfigError.
    """
    cursor = _Cursor(data, where)
    del data  # the cursor has it as text
    found = False
    for key in [name] if cursor.space() == "[" else cursor.lists("annotations"):
        found = True
        for place, start, element in cursor.elements(key):
            yield place, cursor.text[start : cursor.at], element
    if not found:
        raise ConfigError(f"{where}: expected a list, or an object with annotations; it has none")


def check_field(element: Any, name: str, kinds: tuple[type, ...], place: str) -> Any:
    """The field `name` of a JSON object, of one of `kinds`. Raises ConfigError that begins with `place`."""
    if not isinstance(element, dict):
        raise ConfigError(f"{place} must be an object, got {type(element).__name__}")
    value = element.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(dict.fromkeys(NAMES[kind] for kind in kinds))
        got = (
            f"got {type(value).__name__}" if name in element else f"it has {', '.join(map(str, element)) or 'nothing'}"
        )
        raise ConfigError(f"{place}: {name} must be {wanted}, {got}"[:500])
    return value


def _image(element: Any, place: str) -> CocoImage:
    number = check_field(element, "id", (int, str), place)
    name = check_field(element, "file_name", (str,), place)
    width, height = (element.get(key) for key in ("width", "height"))
    known = type(width) is int and type(height) is int and width > 0 and height > 0
    return CocoImage(str(number), name, width if known else 0, height if known else 0)
