"""Label spaces: the bundled ones are sound, and a file that is none is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, StorageError
from pipeline.taxonomy import Taxonomy, build_taxonomy, bundled_taxonomies, load_taxonomy

# Name: classes, things, first and last id.
BUNDLED = {
    "ade20k150": (150, 100, 1, 150),
    "camvid11": (11, 3, 0, 10),
    "cityscapes19": (19, 8, 0, 18),
    "cityscapes34": (34, 10, 0, 33),
    "coco80": (80, 80, 1, 90),
    "coco_panoptic": (133, 80, 1, 200),
    "objects": (1, 1, 1, 1),
    "scenes": (8, 3, 0, 7),
    "voc21": (21, 20, 0, 20),
}
# Official colours that several classes share: ADE20K's road and skyscraper, and what Cityscapes draws black or as pole.
SHARED_COLORS = {"ade20k150": 1, "cityscapes34": 5}


def category(number: int = 0, **more: object) -> dict[str, object]:
    return {"id": number, "name": f"c{number}", "kind": "stuff", "color": [1, 2, 3], **more}


def tree(*categories: object) -> dict[str, object]:
    return {"name": "t", "source": "here", "categories": list(categories)}


def test_all_bundled_ones_are_known_here() -> None:
    assert bundled_taxonomies() == tuple(sorted(BUNDLED))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled(name: str) -> None:
    taxonomy = load_taxonomy(name)
    classes, things, first, last = BUNDLED[name]
    assert taxonomy.name == name
    assert taxonomy.source
    assert len(taxonomy.ids) == len(set(taxonomy.ids)) == classes
    assert sum(c.kind == "thing" for c in taxonomy.categories) == things
    assert (taxonomy.ids[0], taxonomy.ids[-1]) == (first, last)
    assert list(taxonomy.ids) == sorted(taxonomy.ids)
    assert len({c.name for c in taxonomy.categories}) == classes
    assert (taxonomy.void_id, taxonomy.dtype) == (255, np.uint8)
    assert len({c.color for c in taxonomy.categories}) == classes - SHARED_COLORS.get(name, 0)
    assert not set(taxonomy.void_ids) & set(taxonomy.ids)


@pytest.mark.parametrize("name", BUNDLED)
def test_palette_has_the_colours(name: str) -> None:
    taxonomy = load_taxonomy(name)
    assert taxonomy.palette.shape == (256, 3)
    assert taxonomy.palette.dtype == np.uint8
    for c in taxonomy.categories:
        assert tuple(taxonomy.palette[c.id]) == c.color == taxonomy.by_id[c.id].color
    others = np.setdiff1d(np.arange(256), taxonomy.ids)
    assert not taxonomy.palette[others].any()


def test_voc_colours_follow_the_development_kit() -> None:
    # The bit-shuffling of VOCdevkit's VOClabelcolormap.m.
    for index, c in enumerate(load_taxonomy("voc21").categories):
        color, number = [0, 0, 0], index
        for bit in range(8):
            for channel in range(3):
                color[channel] |= ((number >> channel) & 1) << (7 - bit)
            number >>= 3
        assert c.color == tuple(color)


@pytest.mark.parametrize(
    ("last", "void", "dtype"), [(254, 255, np.uint8), (255, 65535, np.uint16), (65534, 65535, np.uint16)]
)
def test_void_is_above_every_id(last: int, void: int, dtype: type) -> None:
    taxonomy = build_taxonomy(tree(category(0), category(last)), "here")
    assert (taxonomy.void_id, taxonomy.dtype) == (void, dtype)
    assert np.iinfo(dtype).max >= void
    assert taxonomy.palette.shape == (void + 1, 3)


BYTE = st.integers(0, 255)
CATEGORY = st.fixed_dictionaries(
    {
        "id": st.integers(0, 65534),
        "name": st.text(max_size=9),
        "kind": st.sampled_from(["thing", "stuff"]),
        "color": st.tuples(BYTE, BYTE, BYTE),
    }
)


@given(st.lists(CATEGORY, min_size=1, max_size=9, unique_by=lambda c: c["id"]))
def test_describe_is_the_inverse_of_build(categories: list[dict[str, object]]) -> None:
    taxonomy = build_taxonomy(tree(*categories), "here")
    assert taxonomy.ids == tuple(c["id"] for c in categories)
    assert build_taxonomy(json.loads(json.dumps(taxonomy.describe())), "there") == taxonomy


def test_void_ids_are_described_only_where_there_are_any() -> None:
    # The version of a model is a hash over its taxonomy's description.
    assert "void_ids" not in build_taxonomy(tree(category()), "here").describe()
    taxonomy = build_taxonomy({**tree(category()), "void_ids": [7, 255]}, "here")
    assert taxonomy.void_ids == (7, 255)
    assert build_taxonomy(taxonomy.describe(), "there") == taxonomy


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_ones_survive_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(load_taxonomy(name).describe()), "utf-8")
    assert load_taxonomy(str(path)) == load_taxonomy(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("coco", "did you mean coco80?"),
        ("VOC21", "voc21"),
        ("xyz", f"bundled: {', '.join(sorted(BUNDLED))}"),
        ("a/b.yaml.gz", "or give a .yaml file"),
    ],
)  # fmt: skip
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="unknown taxonomy") as caught:
        load_taxonomy(name)
    assert hint in str(caught.value)


WRONG = {
    "no mapping": "[1]",
    "empty": "",
    "no categories": "{name: a, source: b}",
    "categories are text": "{name: a, source: b, categories: abc}",
    "none at all": yaml.safe_dump(tree()),
    "id twice": yaml.safe_dump(tree(category(1), category(1))),
    "negative id": yaml.safe_dump(tree(category(-1))),
    "id is void": yaml.safe_dump(tree(category(65535))),
    "id is infinite": yaml.safe_dump(tree(category(id=float("inf")))),
    "id is text": yaml.safe_dump(tree(category(id="one"))),
    "id is a number in quotes": yaml.safe_dump(tree(category(id="1"))),
    "id between two": yaml.safe_dump(tree(category(id=1.5))),
    "name is a list": yaml.safe_dump(tree(category(name=["a"]))),
    "name is null": yaml.safe_dump({**tree(category()), "name": None}),
    "no name": yaml.safe_dump(tree({"id": 1, "kind": "thing", "color": [1, 2, 3]})),
    "kind": yaml.safe_dump(tree(category(kind="things"))),
    "two channels": yaml.safe_dump(tree(category(color=[1, 2]))),
    "too bright": yaml.safe_dump(tree(category(color=[1, 2, 256]))),
    "void is a class": yaml.safe_dump({**tree(category(1)), "void_ids": [1]}),
    "void is negative": yaml.safe_dump({**tree(category(1)), "void_ids": [-1]}),
    "void is no list": yaml.safe_dump({**tree(category(1)), "void_ids": 3}),
    "hex colour": yaml.safe_dump(tree(category(color="#ff0000"))),
    "not yaml": "{a: [",
    "bomb": "a: &a [1]\ncategories: [*a, *a]",
    "bad date": "a: 2001-13-45",
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_hold_no_taxonomy(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yml"
    path.write_text(WRONG[name], "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_taxonomy(str(path))
    assert "bad.yml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_are_bounded_and_must_exist(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("#" * 2_000_001)
    for name in ("big.yaml", "none.yaml"):
        with pytest.raises(StorageError, match=name):
            load_taxonomy(str(tmp_path / name))


def test_names_may_look_like_numbers() -> None:
    """As MNIST's do; YAML reads 7 and 7.0 as numbers."""
    found = build_taxonomy(tree(category(7, name=7), category(8.0, name="8")), "here")
    assert [(c.id, c.name) for c in found.categories] == [(7, "7"), (8, "8")]
    assert type(found.ids[1]) is int


def test_a_taxonomy_is_a_value() -> None:
    assert load_taxonomy("scenes") == load_taxonomy("scenes")
    assert isinstance(load_taxonomy("scenes"), Taxonomy)
