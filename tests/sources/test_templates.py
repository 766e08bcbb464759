"""Path templates: where captures lead, and that a listing knows every path that a template can give."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_faults import FlakyFileSystem

from pipeline.errors import ConfigError
from pipeline.sources.templates import Template, check_template, is_absolute, path_captures, path_pattern

PART = st.text("ab.+{}(1é ", min_size=1, max_size=4).filter(lambda part: not part.startswith("."))
TEMPLATES = [
    "{stem}.png", "{dir}/{stem}.png", "{dir}/x/{stem}_{id}.png", "p/{city}/{id}.png", "p/{dir}/{stem}.{ext}",
    "p/{id}/{id}_{city}.png", "p/a+b/{dir}{stem}", "p//{city}//{dir}/{id}.png", "p/./q/../{city}/{dir}/{stem}.png",
    "p/fixed.png", "../up/{dir}/{dir}/{stem}.png", "p/{id}1{id}.png", "p/{dir}d/{stem}",
]  # fmt: skip


@given(
    st.sampled_from(TEMPLATES),
    st.fixed_dictionaries({"stem": PART, "id": PART, "city": PART, "ext": PART | st.just("")}),
    st.lists(PART, max_size=3).map("/".join),
)
def test_a_listing_has_what_captures_lead_to(text: str, captures: dict[str, str], folder: str) -> None:
    FlakyFileSystem.reset()
    template = Template.below(FlakyFileSystem(), "root/img", text)
    wanted = template.wanted({**captures, "dir": folder})
    assert wanted is not None
    FlakyFileSystem.files = {wanted.path: b"1", "root/other": b"", "root/img/p/other": b"", "elsewhere/x.png": b""}
    assert list(template.listing() or ()) == [wanted.path]
    assert template.name(wanted) == wanted.path.removeprefix(template.folder).lstrip("/")


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("p/{stem}.png", ["a.png", "d/a.png", "a.jpg", "a.png.x", ".png"], ["a.png"]),
        ("p/{dir}/{stem}.png", ["a.png", "d/a.png", "d/e/a.png"], ["a.png", "d/a.png", "d/e/a.png"]),
        ("p/{id}/{id}.png", ["a/a.png", "a/b.png"], ["a/a.png"]),
        ("p/{id}{id}1.png", ["aa1.png", "ab1.png"], ["aa1.png"]),
        ("p/a.{ext}", ["a.png", "a.", "axpng"], ["a.png", "a."]),
    ],
)
def test_shapes(text: str, names: list[str], expected: list[str]) -> None:
    FlakyFileSystem.reset({f"root/p/{name}": b"" for name in names})
    listing = Template.below(FlakyFileSystem(), "root", text).listing()
    assert listing is not None
    assert sorted(listing) == sorted(f"root/p/{name}" for name in expected)


def test_what_cannot_be_listed() -> None:
    FlakyFileSystem.reset({"root/x": b""})
    assert Template.below(FlakyFileSystem(), "root", "{dir}/../{stem}").listing() is None
    assert Template.below(FlakyFileSystem(), "root", "none/{stem}").listing() == {}


@pytest.mark.parametrize("value", ["..", "../x", "a/../../b", "a/.."])
def test_a_capture_never_leads_up(value: str) -> None:
    template = Template.below(FlakyFileSystem(), "root", "p/{city}/{id}.png")
    assert template.wanted({"city": value, "id": "1"}) is None
    assert template.wanted({"city": "a..b", "id": "1"}) is not None


@given(st.text(max_size=12))
def test_no_capture_leaves_the_folder(value: str) -> None:
    wanted = Template.below(FlakyFileSystem(), "root", "p/{city}/x.png").wanted({"city": value})
    assert wanted is None or re.fullmatch(r"root/p/(?s:.*)x\.png", wanted.path)


def test_a_capture_that_is_missing() -> None:
    assert Template.below(FlakyFileSystem(), "root", "{city}.png").wanted({"id": "1"}) is None


@pytest.mark.parametrize(
    ("template", "path", "expected"),
    [
        (None, "a/b.c.jpg", {"dir": "a", "stem": "b.c", "ext": "jpg"}),
        (None, "k", {"dir": "", "stem": "k", "ext": ""}),
        ("{city}/{stem}_x.jpg", "ulm/7_x.jpg", {"dir": "ulm", "stem": "7", "ext": "jpg", "city": "ulm"}),
        ("{city}.png", "ulm/7_x.jpg", {"dir": "ulm", "stem": "7_x", "ext": "jpg"}),
    ],
)
def test_captures(template: str | None, path: str, expected: dict[str, str]) -> None:
    assert path_captures(path_pattern(template, "t"), path) == expected


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (path_pattern, ("{id", "here"), r"here: '\{id' has an unbalanced brace"),
        (path_pattern, ("{a b}", "here"), r"here: \{a b\} in '\{a b\}' is no name of a capture"),
        (check_template, ("{id}", {"stem"}, "here"), r"here: '\{id\}' captures \{id\}; known captures: stem"),
        (check_template, ("{stem}{", {"stem"}, "here"), "here: .* has an unbalanced brace"),
    ],
)
def test_templates_that_cannot_work(call: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(*arguments)


def test_which_templates_stand_alone() -> None:
    assert [is_absolute(text) for text in ("/p/{stem}", "s3://b/{stem}", "p/{stem}", "../p", "{dir}/x")] == [
        True, True, False, False, False,
    ]  # fmt: skip
