"""Run configs: what is read, what is refused and in which words, what is described, and what is kept secret."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pipeline import config as module
from pipeline import configfile
from pipeline.config import (
    CocoSource,
    EvaluateConfig,
    LabelConfig,
    PackConfig,
    Resources,
    ScenesSource,
    WebdatasetSource,
)
from pipeline.configfile import describe, load_config, load_overrides, load_yaml, redacted, source_from
from pipeline.errors import ConfigError, MaskmillError, StorageError

BASE = "source: {format: scenes, count: 7}\nmodels: [{name: unet_small}, {name: null_model}]\noutput: {uri: out}\n"
REPOSITORY = Path(__file__).resolve().parent.parent


def load(text: str | bytes, tmp_path: Path, *overrides: str) -> LabelConfig:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(LabelConfig, str(path), overrides)


def message(text: str | bytes, tmp_path: Path, *overrides: str, kind: type[MaskmillError] = ConfigError) -> str:
    with pytest.raises(MaskmillError) as caught:
        load(text, tmp_path, *overrides)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_public_names() -> None:
    assert all(hasattr(module, name) for name in module.__all__)
    assert {"LabelConfig", "EvaluateConfig", "PackConfig", "SourceConfig", "Section"} <= set(module.__all__)
    assert {"load_config", "describe", "redacted", "source_from"} <= set(configfile.__all__)


def test_yaml_and_defaults(tmp_path: Path) -> None:
    config = load(BASE, tmp_path)
    assert config.source == ScenesSource(format="scenes", count=7)
    assert [model.name for model in config.models] == ["unet_small", "null_model"]
    assert (config.output.uri, config.output.format, config.failure_budget) == ("out", "png", 0.01)
    assert config.resources == Resources()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_the_repository_are_right(path: Path) -> None:
    kind = PackConfig if "pack" in path.stem else LabelConfig
    overrides = [f"{name}={json.dumps(value)}" for name, value in yaml.safe_load(path.read_text("utf-8")).items()]
    assert load_config(kind, str(path)) == load_config(kind, None, overrides)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("source.count=9", lambda c: c.source.count == 9),
        ("models.0.name=x", lambda c: [m.name for m in c.models] == ["x", "null_model"]),
        ("models.2.name=x", lambda c: [m.name for m in c.models] == ["unet_small", "null_model", "x"]),
        ("models.1.options.resize=64", lambda c: c.models[1].options == {"resize": 64}),
        ("models.1.options={a: [1, 2]}", lambda c: c.models[1].options == {"a": [1, 2]}),
        ("models=[{name: y}]", lambda c: [m.name for m in c.models] == ["y"]),
        ("resources.workers=3", lambda c: c.resources.workers == 3),
        ("resources.workers=auto", lambda c: c.resources.workers == "auto"),
        ("output.uri=s3://b/a=b", lambda c: c.output.uri == "s3://b/a=b"),
        (
            "source.storage.client_kwargs.region_name=r",
            lambda c: c.source.storage == {"client_kwargs": {"region_name": "r"}},
        ),
        (
            "source={format: coco, uri: u, panoptic: p}",
            lambda c: c.source == CocoSource(format="coco", uri="u", panoptic="p"),
        ),
        ("output.uri=*.jpg", lambda c: c.output.uri == "*.jpg"),  # no YAML: text as it is
        ("output.uri={id}_x.png", lambda c: c.output.uri == "{id}_x.png"),
        ("ray_address=", lambda c: c.ray_address is None),
        ("models.0.refine.0.kind=crf", lambda c: [stage.iterations for stage in c.models[0].refine] == [10]),
        ("models.0.tta={scales: [0.5, 1], flip: true}", lambda c: c.models[0].tta.scales == (0.5, 1.0)),
    ],
)
def test_overrides(override: str, read: Any, tmp_path: Path) -> None:
    assert read(load(BASE, tmp_path, override))


def test_the_last_override_wins_and_no_file_is_needed(tmp_path: Path) -> None:
    overrides = ["source.format=scenes", "models.0.name=unet_small", "models.0.label=a", "output.uri=x", "output.uri=y"]
    config = load_config(LabelConfig, None, overrides)
    assert (config.models[0].label, config.output.uri) == ("a", "y")
    assert config == load(yaml.safe_dump(load_overrides(overrides)), tmp_path)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.recursive(
            st.integers(),
            lambda x: st.lists(x, min_size=1, max_size=3) | st.dictionaries(st.sampled_from(["d", "e"]), x, min_size=1),
            max_leaves=6,
        ),
        min_size=1,
    )
)
def test_a_tree_written_as_overrides_is_that_tree(tree: dict[str, Any]) -> None:
    def leaves(value: Any, path: str) -> list[str]:
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            return [leaf for key, item in items for leaf in leaves(item, f"{path}.{key}")]
        return [f"{path[1:]}={value}"]

    assert load_overrides(leaves(tree, "")) == tree


# Each with words that its message must hold: where, what was expected, what came.
WRONG = [
    (BASE + "sead: 1", ["unknown key 'sead' in the config", "did you mean seed?"]),
    (BASE.replace("count", "cuont"), ["unknown key 'cuont' in source", "did you mean count?"]),
    (BASE.replace("name: null_model", "nane: x, name: y"), ["unknown key 'nane' in models.1", "did you mean name?"]),
    (BASE.replace("uri: out", "uri: o, fromat: zstd"), ["unknown key 'fromat' in output", "did you mean format?"]),
    (BASE + "resources: {wrokers: 1}", ["unknown key 'wrokers' in resources", "did you mean workers"]),
    (BASE + "zzzzzz: 1", ["unknown key 'zzzzzz' in the config"]),
    (BASE + "1: 2", ["1: keys should be strings, got 1"]),
    (BASE.replace("source", "sorce"), ["unknown key 'sorce'", "did you mean source", "source: field required"]),
    ("models: [{name: a}]", ["source: field required", "output: field required"]),
    (BASE.replace("{uri: out}", "{}"), ["output.uri: field required"]),
    (BASE.replace("format: scenes, ", ""), ["source: unable to extract tag", "format", "got a mapping of count"]),
    (BASE.replace("scenes", "scene"), ["source:", "'scene'", "'webdataset', 'parquet', 'files', 'coco', 'scenes'"]),
    (BASE.replace("scenes, count: 7", "webdataset"), ["source.uri: field required"]),
    (BASE.replace("scenes, count: 7", "coco, uri: u"), ["source.instances or source.panoptic must be given"]),
    (BASE.replace("7", "many"), ["source.count: input should be a valid integer", "got 'many'"]),
    (BASE.replace("7", "0"), ["source.count: input should be greater than or equal to 1, got 0"]),
    (BASE.replace("uri: out", "uri: 5"), ["output.uri: input should be a valid string, got 5"]),
    (BASE.replace("uri: out", "uri: o, format: tiff"), ["output.format: input should be 'png' or 'zstd', got 'tiff'"]),
    (BASE.replace("uri: out", "uri: o, commit_interval_s: .inf"), ["output.commit_interval_s:", "finite", "got inf"]),
    (BASE + "failure_budget: 2", ["failure_budget: input should be less than or equal to 1, got 2"]),
    (BASE + "failure_budget: .nan", ["failure_budget:", "got nan"]),
    (BASE + "retry: all", ["retry: input should be 'none' or 'failed', got 'all'"]),
    (BASE + "resources: {workers: few}", ["resources.workers: input should be a valid integer", "'auto', got 'few'"]),
    (BASE + "resources: {torch_threads: 0}", ["resources.torch_threads:", "equal to 1 or", "'auto', got 0"]),
    (BASE + "resources: {gpus_per_worker: -1}", ["resources.gpus_per_worker:", "or input should be 'auto', got -1"]),
    (BASE + "resources: [1]", ["resources:", "got a list of 1"]),
    (BASE.replace("{name: null_model}", "null_model"), ["models.1:", "got 'null_model'"]),
    (BASE.replace("{name: null_model}", "{label: x}"), ["models.1: one of name, spec, or a weights URI"]),
    (BASE.replace("{name: null_model}", "{name: x, spec: a:B}"), ["models.1: give one of name and spec, not both"]),
    (
        BASE.replace("{name: null_model}", "{name: x, refine: [{kind: crf, sdim: 3}]}"),
        ["unknown key 'sdim' in models.1.refine.0"],
    ),
    (
        BASE.replace("{name: null_model}", "{name: x, refine: [{kind: crf, iteration: 3}]}"),
        ["unknown key 'iteration' in models.1.refine.0", "did you mean iterations"],
    ),
    (
        BASE.replace("{name: null_model}", "{name: x, refine: [{kind: crf, iterations: 0}]}"),
        ["models.1.refine.0.iterations: input should be greater than or equal to 1, got 0"],
    ),
    (BASE.replace("{name: null_model}", "{name: x, refine: [{kind: cfr}]}"), ["models.1.refine.0:", "'cfr'", "'crf'"]),
    (
        BASE.replace("{name: null_model}", "{name: x, refine: [{kind: small_regions}, {kind: crf}]}"),
        ["models.1: refine.1 (crf) needs probabilities, but the stage before gives labels"],
    ),
    (BASE.replace("{name: null_model}", "{name: x, tta: {scales: []}}"), ["models.1.tta.scales:", "at least 1 item"]),
    (
        BASE.replace("{name: null_model}", "{name: x, tta: {scales: [1, 1]}}"),
        ["models.1.tta: scales must differ, got 1.0, 1.0"],
    ),
    (
        BASE.replace("{name: null_model}", "{name: x, tta: {window: {size: 64, overlap: 40}}}"),
        ["models.1.tta.window: overlap must be at most half of size (64), got 40"],
    ),
    ("source: {format: scenes}\nmodels: []\noutput: {uri: o}", ["models:", "at least 1 item", "got a list of 0"]),
    ("", ["run.yaml must hold a mapping of fields, got NoneType"]),
    ("[1, 2]", ["run.yaml must hold a mapping of fields, got list"]),
    ("just text", ["run.yaml must hold a mapping of fields, got str"]),
    ("a: [1", ["run.yaml is not readable YAML: expected ',' or ']'", "(line 1)"]),
    ("a: 1\n---\nb: 2", ["run.yaml is not readable YAML:", "another document (line 2)"]),
    ("a: 1\na: 2", ["run.yaml is not readable YAML: 'a' stands twice in one mapping (line 2)"]),
    (BASE.encode("utf-16"), ["run.yaml is not readable YAML:"]),
    (bytes(range(256)), ["run.yaml is not readable YAML:"]),
    (BASE + "seed: 2001-13-45", ["run.yaml is not readable YAML: month must be in 1..12"]),
    (BASE + "seed: " + "9" * 5000, ["run.yaml is not readable YAML:"]),
    *((BASE + f"seed: !!{tag} x", ["run.yaml is not readable YAML:"]) for tag in ("int", "float", "bool", "timestamp")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "parts"), WRONG)
def test_what_is_wrong_is_said_in_one_line(text: str | bytes, parts: list[str], tmp_path: Path) -> None:
    said = message(text, tmp_path)
    for part in parts:
        assert part in said


def test_one_mistake_gives_one_complaint_and_two_give_two(tmp_path: Path) -> None:
    assert ";" not in message(BASE.replace("{name: null_model}", "{name: 5}"), tmp_path)
    assert message(BASE + "seed: x\nretry: y", tmp_path).count("; ") == 1


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("seed", "expected dotted.key=value, got 'seed'"),
        ("=1", "expected dotted.key=value, got '=1'"),
        ("models.5.name=a", "models.5.name: expected an index from 0 to 2, got '5'"),
        ("models.-1.name=a", "models.-1.name: expected an index from 0 to 2, got '-1'"),
        ("models.x=1", "models.x: expected an index from 0 to 2, got 'x'"),
        ("models." + "9" * 5000 + "=1", "expected an index"),
        ("output.uri.x=1", "output.uri.x: output.uri is a str, it has no field 'x'"),
        ("seed=[1", "seed: input should be a valid integer, unable to parse string as an integer, got '[1'"),
        ("source.storage={secret: S3CRET", "source.storage: input should be a valid dictionary, got str"),
    ],
)
def test_wrong_overrides(override: str, part: str, tmp_path: Path) -> None:
    assert part in message(BASE, tmp_path, override)


@pytest.mark.parametrize("tag", ["python/object/apply:os.system ['true']", "python/name:os.system", "python/tuple [1]"])
def test_python_tags_are_refused(tag: str, tmp_path: Path) -> None:
    assert "could not determine a constructor" in message(BASE + f"seed: !!{tag}", tmp_path)


BOMBS = {
    "laughs": "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]",
    "anchor alone": "a: &a 1",
    "alias to itself": "a: &a [*a]",
    "merge": "a: &a {x: 1}\nb: {<<: *a}",
    "flow nesting": "a: " + "[" * 200_000,
    "mapping nesting": "{a: " * 200_000,
    "block nesting": "".join(" " * depth + "a:\n" for depth in range(1300)),
    "many keys": "".join(f"k{i}: 1\n" for i in range(5_000)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs_are_refused_soon(name: str, tmp_path: Path) -> None:
    started = time.perf_counter()
    said = message(BOMBS[name], tmp_path)
    assert time.perf_counter() - started < 10
    assert "anchors and aliases are not allowed" in said or "recursion" in said or name == "many keys"


def test_the_file_is_bounded_and_must_exist(tmp_path: Path) -> None:
    assert "larger than the 1000000 bytes" in message("#" * 1_000_001, tmp_path, kind=StorageError)
    assert load(BASE + "#" * (1_000_000 - len(BASE)), tmp_path) == load(BASE, tmp_path)
    with pytest.raises(StorageError, match="does not exist"):
        load_config(LabelConfig, str(tmp_path / "none.yaml"))


SECRETS = ["AKIAKEY", "S3CRET", "T0KEN", "NESTED", "DEEPER", "USERPW"]
CREDENTIALS: dict[str, Any] = {
    "key": "AKIAKEY",
    "secret": "S3CRET",
    "token": "T0KEN",
    "endpoint_url": "http://user:USERPW@minio:9000/x",
    "anon": False,
    "client_kwargs": {"aws_secret_access_key": "NESTED", "region_name": "eu-1", "config": {"password": ["DEEPER"]}},
}


def test_redacted_hides_credentials_and_keeps_addresses() -> None:
    tree = load_overrides(
        ["source.format=webdataset", "models.0.name=m", "source.uri=https://user:USERPW@host/{0..9}.tar"]
    )
    tree["models"][0]["weights"] = "abfs://container@account.dfs/w.safetensors"
    tree["output"] = {"uri": "s3://b/out", "storage": CREDENTIALS}
    tree["source"]["storage"] = tree["models"][0]["storage"] = CREDENTIALS
    plain = redacted(LabelConfig.model_validate(tree))
    text = json.dumps(plain)
    assert not [secret for secret in SECRETS if secret in text]
    for storage in (plain["source"]["storage"], plain["models"][0]["storage"], plain["output"]["storage"]):
        assert storage["endpoint_url"] == "http://user:***@minio:9000/x"
        assert storage["client_kwargs"]["region_name"] == "eu-1"
        assert storage["anon"] is False
        assert set(storage) == set(CREDENTIALS)
    assert plain["output"]["uri"] == "s3://b/out"
    assert plain["source"]["uri"] == "https://user:***@host/{0..9}.tar"
    assert plain["models"][0]["weights"] == "abfs://container@account.dfs/w.safetensors"


def test_what_is_redacted_without_secrets_is_the_config(tmp_path: Path) -> None:
    config = load(BASE, tmp_path)
    assert LabelConfig.model_validate(redacted(config)) == config
    assert source_from(redacted(config)["source"]) == config.source


@pytest.mark.parametrize("tree", [{}, {"format": "tar"}, {"format": "coco", "uri": "u"}, {"format": "files"}])
def test_source_from_refuses_what_is_no_source(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not a source") as caught:
        source_from(tree)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{format: wrong, storage: {secret: S3CRET}}",
        "{count: 1, storage: {secret: S3CRET}}",
        "{format: scenes, storage: S3CRET}",
        "{format: scenes, storage: [S3CRET]}",
        "{format: scenes, storage: {1: S3CRET}}",
        "{format: scenes, storage: {secret: S3CRET",
    ],
)
def test_no_message_repeats_a_secret(source: str, tmp_path: Path) -> None:
    assert "S3CRET" not in message(f"source: {source}\nmodels: [{{name: a}}]\noutput: {{uri: o}}", tmp_path)


def every_field(kind: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names by pydantic's own schema, not by `describe`."""
    names: set[str] = set()
    schema = kind.model_json_schema()

    def walk(node: dict[str, Any], path: str) -> None:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        if "oneOf" in node:
            for option in node["oneOf"]:
                walk(option, path)
        elif node.get("type") == "array" and {"$ref", "oneOf"} & node.get("items", {}).keys():
            walk(node["items"], f"{path}.N")
        elif any("$ref" in option for option in node.get("anyOf", [])):
            walk(next(option for option in node["anyOf"] if "$ref" in option), path)
        elif "properties" in node:
            for name, field in node["properties"].items():
                walk(field, f"{path}.{name}" if path else name)
        else:
            names.add(path)

    walk(schema, prefix)
    return names


@pytest.mark.parametrize("kind", [LabelConfig, PackConfig, EvaluateConfig])
def test_describe_lists_every_field_with_its_meaning(kind: type[Any]) -> None:
    rows = describe(kind)
    assert {name for name, _, _ in rows} == every_field(kind)
    assert not [name for name, default, meaning in rows if not meaning.strip() or not default]
    assert len({(name, meaning) for name, _, meaning in rows}) == len(rows)
    required = "predictions.uri" if kind is EvaluateConfig else "output.uri"
    assert (required, "required") in {(name, default) for name, default, _ in rows}


def test_described_defaults_are_the_defaults() -> None:
    for name, default, _ in describe(Resources):
        assert json.loads(default) == getattr(Resources(), name)


def test_configs_are_frozen(tmp_path: Path) -> None:
    config = load(BASE, tmp_path)
    for section, field in (
        (config, "seed"),
        (config.source, "limit"),
        (config.output, "uri"),
        (config.models[0], "name"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, 1)


def test_load_yaml_names_its_place() -> None:
    assert load_yaml("{a: [1, x, 2.5, true, null]}", "here") == {"a": [1, "x", 2.5, True, None]}
    with pytest.raises(ConfigError, match=r"^here is not readable YAML"):
        load_yaml("a: b: c", "here")


def test_sources_share_their_limits() -> None:
    assert WebdatasetSource(format="webdataset", uri="u").max_pixels == 200_000_000
    with pytest.raises(ValidationError):
        WebdatasetSource(format="webdataset", uri="u", max_pixels=0)
