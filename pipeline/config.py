"""Run configs: one YAML file plus dotted overrides, checked whole when built, frozen afterwards.

A field is documented beside the field; `maskmill JOB --help` prints these texts.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError
from pipeline.storage import read_bytes

__all__ = [
    "CocoSource",
    "EvaluateConfig",
    "FilesSource",
    "LabelConfig",
    "ModelConfig",
    "OutputConfig",
    "PackConfig",
    "ParquetSource",
    "PredictionsConfig",
    "Resources",
    "ScenesSource",
    "ScoreConfig",
    "SourceConfig",
    "TableSource",
    "WebdatasetSource",
    "describe",
    "load_config",
    "load_overrides",
    "load_yaml",
    "redacted",
    "source_from",
]

MAX_YAML_BYTES = 1_000_000
Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Storage = dict[str, Any]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


SectionT = TypeVar("SectionT", bound=Section)


class _AnySource(Section):
    storage: Storage = Field({}, description="fsspec options: key, secret, endpoint_url, anon, client_kwargs, ...")
    limit: int | None = Field(None, ge=1, description="only the first N images, in plan order")
    max_pixels: int = Field(200_000_000, ge=1, description="larger images fail as ImageTooLargeError before decoding")
    max_bytes: int = Field(1_000_000_000, ge=1, description="larger encoded objects fail as ImageTooLargeError unread")


class WebdatasetSource(_AnySource):
    format: Literal["webdataset"]
    uri: str = Field(description="tar shards (.tar, .tar.gz): a folder, glob or brace pattern, s3://b/s-{000..127}.tar")


class ParquetSource(_AnySource):
    format: Literal["parquet"]
    uri: str = Field(description="Parquet files: a folder, glob or brace pattern; a unit is one row group")
    image_column: str = Field("image", description="a binary column, or a struct {bytes, path}")
    id_column: str | None = Field(None, description="unique string or integer column for image_id; default: row number")
    target_columns: dict[str, str] = Field(
        {}, description="columns with encoded targets by kind: semantic, panoptic, segments, instances, depth"
    )
    field_columns: tuple[str, ...] = Field((), description="further columns to carry along, for slicing reports")


class FilesSource(_AnySource):
    format: Literal["files"]
    uri: str = Field(description="image files: a folder (searched below), glob or brace pattern")
    images: str | None = Field(
        None,
        description="path template below uri with captures, e.g. leftImg8bit/{split}/{city}/{id}_leftImg8bit.png; "
        "without it {dir}, {stem} and {ext} are captured",
    )
    targets: dict[str, str] = Field(
        {},
        description="target path by kind (semantic, panoptic, segments, instances, depth), built from the captures, "
        "below uri or absolute, e.g. semantic: gtFine/{split}/{city}/{id}_gtFine_labelIds.png",
    )
    unit_images: int = Field(256, ge=1, description="images in one unit; enough for a second of work or more")


class CocoSource(_AnySource):
    format: Literal["coco"]
    uri: str | None = Field(None, description="folder of the images; evaluate can do without, it reads targets alone")
    instances: str | None = Field(None, description="COCO instances JSON")
    panoptic: str | None = Field(None, description="COCO panoptic JSON")
    panoptic_masks: str | None = Field(None, description="folder of the panoptic PNGs; default: panoptic without .json")
    unit_images: int = Field(256, ge=1, description="images in one unit; enough for a second of work or more")

    @model_validator(mode="after")
    def _has_annotations(self) -> Self:
        if self.instances is None and self.panoptic is None:
            raise ValueError("source.instances or source.panoptic must be given for format coco")
        return self


class ScenesSource(_AnySource):
    format: Literal["scenes"]
    uri: str = Field("scenes://", description="unused: scenes are generated, the same for each seed on every machine")
    count: int = Field(200, ge=1, description="how many scenes")
    start: int = Field(0, ge=0, description="index of the first scene")
    seed: int = Field(0, ge=0, description="another seed, another world")
    width: int = Field(256, ge=8, le=8192, description="pixels")
    height: int = Field(192, ge=8, le=8192, description="pixels")
    unit_images: int = Field(64, ge=1, description="images in one unit; enough for a second of work or more")
    targets: tuple[Literal["semantic", "panoptic", "instances", "depth"], ...] = Field(
        ("semantic", "panoptic", "instances", "depth"), description="which targets to render"
    )


class TableSource(_AnySource):
    format: Literal["table"]
    uri: str = Field(description="output of a labelling run: what its model said is the target of another's evaluation")
    model: str | None = Field(None, description="label of the model; default: the first")


SourceConfig = Annotated[
    WebdatasetSource | ParquetSource | FilesSource | CocoSource | ScenesSource | TableSource,
    Field(discriminator="format"),
]


class ModelConfig(Section):
    name: str | None = Field(None, description="a model of the registry (`maskmill models` lists them)")
    spec: str | None = Field(None, description='a ModelSpec of your own, "package.module:SPEC"')
    weights: str = Field(
        "none",
        description="none (random, seeded) | bundled:NAME | torchvision:ENUM | "
        "path or URI of a checkpoint folder, .safetensors or .pt file",
    )
    taxonomy: str | None = Field(None, description="label space: a bundled name or a YAML file; default: the model's")
    label: str | None = Field(None, description="name of this model in the table; default: its spec's name")
    storage: Storage = Field({}, description="fsspec options for a weights URI")
    options: dict[str, Any] = Field(
        {},
        description="resize, max_size, pad_multiple, score_threshold, max_segments, low_confidence, precision "
        "(fp32 | bf16 | fp16), channels_last, compile, and what the model's build takes",
    )

    @model_validator(mode="after")
    def _is_named(self) -> Self:
        if self.name and self.spec:
            raise ValueError("give one of name and spec, not both")
        if not self.name and not self.spec and ":" not in self.weights and "/" not in self.weights:
            raise ValueError("one of name, spec, or a weights URI whose checkpoint names its model must be given")
        return self


class OutputConfig(Section):
    uri: str = Field(description="folder of the prediction table (Delta Lake), local or object storage")
    storage: Storage = Field({}, description="fsspec options for the output")
    format: Literal["png", "zstd"] = Field(
        "png", description="label maps as PNG (opens anywhere) or zstd (raw rows, about 20 times faster to write)"
    )
    rows_per_file: int = Field(
        256, ge=1, le=100_000, description="images per file, and the most work one death can cost each worker"
    )
    commit_interval_s: float = Field(5.0, ge=0.1, description="seconds between commits")


class Resources(Section):
    workers: Count | Auto = Field("auto", description="predicting actors; auto: one per GPU, else one per node")
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto", description="auto: 1 where the cluster has GPUs, else 0"
    )
    cpus_per_worker: float = Field(1.0, ge=0, description="logical CPUs that Ray reserves for one worker")
    memory_per_worker_bytes: int | None = Field(None, ge=1, description="heap that Ray reserves for one worker")
    torch_threads: Count | Auto = Field(
        "auto", description="threads of the forward pass on CPU; auto: the node's cores"
    )
    decode_threads: Count | Auto = Field("auto", description="decoding and encoding threads; auto: 2 to 8 by cores")
    calls_per_worker: int = Field(2, ge=1, le=8, description="units in work at once; while one predicts, others decode")
    layout: Literal["fused", "split"] = Field(
        "fused", description="fused: workers read and decode; split: CPU tasks on any node read and decode for them"
    )
    readers: Count | Auto = Field("auto", description="split layout: reading tasks at once")
    batch_pixels: Count | Auto = Field(
        "auto",
        description="padded pixels in one batch; auto: 1e6 on CPU, by memory on a GPU; halves when out of memory",
    )
    tile_pixels: int = Field(4_194_304, ge=65_536, description="larger inputs are tiled, with overlap and blending")
    predict_timeout_s: float = Field(
        600.0, gt=0, description="a batch that takes longer fails its images as PredictTimeoutError"
    )
    object_store_bytes: int | None = Field(None, ge=80_000_000, description="local Ray only: size of its object store")


class DepthScoreConfig(Section):
    scale: float = Field(0.001, gt=0, description="metres of one step of an integer depth target (KITTI: 0.00390625)")
    invalid: tuple[float, ...] = Field((0.0,), description="stored values that mean no depth (7-Scenes: 0 and 65535)")
    alignment: Literal["none", "median", "least_squares", "least_squares_disparity"] = Field(
        "none", description="fit of each prediction to its target: none, scale by medians, scale and shift"
    )
    min_depth: float = Field(0.001, gt=0, description="metres; nearer targets are not scored, predictions are clamped")
    max_depth: float | None = Field(None, description="metres; likewise (NYU: 10, KITTI: 80)")
    crop: Literal["none", "nyu_eigen", "kitti_garg", "kitti_eigen"] = Field("none", description="window that is scored")


class ScoreConfig(Section):
    """How predictions are held against targets. Predictions are mapped into the targets' label space."""

    taxonomy: str | None = Field(
        None,
        description="label space of the targets: a bundled name or a YAML file; default: the COCO files' categories, "
        "else the model's own",
    )
    merge: dict[str | int, tuple[str | int, ...]] = Field(
        {}, description="class of the target -> classes of the model that count as it, by name or id"
    )
    ids: dict[int, int] = Field({}, description="class id of the model -> class id of the target")
    other: str | int | None = Field(
        None, description="class of the target that unmapped classes become (background); default: void"
    )
    ignore: tuple[int, ...] = Field((), description="further values of the target's label map that are void")
    unknown_is_void: bool = Field(False, description="take target ids outside the taxonomy as void, instead of failing")
    boundary: bool = Field(True, description="boundary IoU and boundary PQ too: about as much work as the rest")
    depth: DepthScoreConfig = Field(DepthScoreConfig(), description="what of a depth map is scored")


class LabelConfig(Section):
    """Label a corpus with one or several models into one table."""

    source: SourceConfig = Field(description="where the images come from")
    models: tuple[ModelConfig, ...] = Field(min_length=1, description="each image gets one row per model")
    output: OutputConfig = Field(description="where the table is")
    score: ScoreConfig | None = Field(
        ScoreConfig(), description="how rows are scored where the source has targets; null: not at all"
    )
    failure_budget: float = Field(
        0.01, ge=0, le=1, description="share of failed rows that stops the run, after 1000 rows or at the end"
    )
    retry: Literal["none", "failed"] = Field("none", description="failed: label again what failed before")
    on_changed: Literal["stop", "relabel"] = Field(
        "stop", description="when a unit changed after it was labelled: stop, or drop its rows and label it again"
    )
    seed: int = Field(0, ge=0, description="seed of random weights")
    resources: Resources = Field(Resources(), description="the cluster's share for this run")
    ray_address: str | None = Field(None, description="Ray cluster to join; default: RAY_ADDRESS, else a local one")


class PredictionsConfig(Section):
    format: Literal["table", "coco", "panoptic", "files", "depth"] = Field(
        "table",
        description="table: a maskmill output; coco: results JSON of boxes or masks; panoptic: COCO panoptic JSON and "
        "PNGs; files: label-map PNGs; depth: 16-bit PNGs or .npy arrays",
    )
    uri: str = Field(
        description="the output, the JSON file, or for files and depth a path template: of {dir}, {stem} and {ext} of "
        "the image id and of what the source captures (source.images, field_columns, {coco_id}); absolute, or for "
        "source.format files and coco below source.uri"
    )
    masks: str | None = Field(None, description="panoptic: folder of the PNGs; default: uri without .json")
    storage: Storage = Field({}, description="fsspec options for the predictions")
    models: tuple[str, ...] = Field((), description="table: labels of the models to score; default: all")
    match: Literal["image_id", "name"] = Field(
        "image_id",
        description="table: predictions belong to targets of the same image_id, or of the same file name "
        "without folder and ending",
    )
    label: str = Field("predictions", description="what the model is called in the report; table: its own label")
    taxonomy: str | None = Field(None, description="label space of the predictions; default: the targets'")
    scale: float = Field(0.001, gt=0, description="depth: metres of one step of a 16-bit PNG; .npy holds metres")
    kind: Literal["metric_m", "relative", "inverse_relative"] = Field("metric_m", description="depth: what it holds")
    max_bytes: int = Field(1_000_000_000, ge=1, description="larger objects are refused unread")


class ScoresOutput(Section):
    uri: str | None = Field(None, description="folder of the scores table; default: _scores in predictions.uri")
    storage: Storage = Field({}, description="fsspec options for the output; default: those of the predictions")
    rows_per_file: int = Field(1000, ge=1, le=100_000, description="images per file")
    commit_interval_s: float = Field(5.0, ge=0.1, description="seconds between commits")


class EvaluateConfig(Section):
    """Score predictions against the targets of a source, into a scores table that `maskmill report` reads."""

    source: SourceConfig = Field(description="where the targets come from")
    predictions: PredictionsConfig = Field(description="what is scored")
    output: ScoresOutput = Field(ScoresOutput(), description="where the scores go")
    score: ScoreConfig = Field(ScoreConfig(), description="how predictions are held against targets")
    failure_budget: float = Field(
        1.0, ge=0, le=1, description="share of images without a score that stops the run; the report lists them anyway"
    )
    retry: Literal["none", "failed"] = Field("none", description="failed: score again what could not be scored before")
    on_changed: Literal["stop", "relabel"] = Field(
        "relabel", description="when targets or predictions of a unit changed after they were scored: again, or stop"
    )
    workers: Count | Auto = Field("auto", description="scoring tasks at once; auto: as the cluster has cores")
    ray_address: str | None = Field(None, description="Ray cluster to join; default: RAY_ADDRESS, else a local one")


class PackOutput(Section):
    uri: str = Field(description="folder of the tar shards, local or object storage")
    storage: Storage = Field({}, description="fsspec options for the output")


class PackConfig(Section):
    """Pack any source into tar shards."""

    source: SourceConfig = Field(description="where the images come from")
    output: PackOutput = Field(description="where the tar shards go")
    images_per_shard: int = Field(1000, ge=1, description="images in one tar; a tar never spans two units")
    ray_address: str | None = Field(None, description="Ray cluster to join; default: RAY_ADDRESS, else a local one")


class _SafeLoader(yaml.SafeLoader):
    """YAML without anchors and aliases (a file of a few lines must not unfold into gigabytes) and without keys that
    stand twice in one mapping (the first would be lost)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError(f"anchors and aliases are not allowed (line {event.start_mark.line + 1})")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"{key.value!r} stands twice in one mapping (line {key.start_mark.line + 1})")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_yaml(text: str, where: str) -> Any:
    """One YAML document of plain values. Raises ConfigError that names `where`."""
    try:
        return yaml.load(text, Loader=_SafeLoader)  # noqa: S506  (a SafeLoader)
    except Exception as error:  # what a tag does not fit raises as it likes: ValueError, KeyError, AttributeError
        problem = str(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            # Not its whole text, which quotes the line, and with it perhaps a secret.
            problem = f"{error.problem} (line {error.problem_mark.line + 1})"
        raise ConfigError(f"{where} is not readable YAML: {' '.join(problem.split())}") from error


def load_config(kind: type[SectionT], uri: str | None, overrides: Sequence[str] = ()) -> SectionT:
    """Read `uri` (YAML), apply `dotted.key=value` overrides (values are YAML), and check the whole.

    Raises ConfigError for unreadable YAML, an unknown key (with the nearest known one), or a value that does not fit;
    StorageError where the file cannot be read.
    """
    tree: Any = {}
    if uri is not None:
        tree = load_yaml(read_bytes(uri, max_bytes=MAX_YAML_BYTES).decode("utf-8", "replace"), uri)
        if not isinstance(tree, dict):
            raise ConfigError(f"{uri} must hold a mapping of fields, got {type(tree).__name__}")
    tree = load_overrides(overrides, tree)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_message(kind, error)) from error


def load_overrides(overrides: Sequence[str], tree: Any = None) -> Any:
    """`dotted.key=value` arguments set in `tree`, which is changed and returned. Raises ConfigError."""
    tree = {} if tree is None else tree
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"expected dotted.key=value, got {override!r}")
        _set(tree, key.split("."), _override_value(value, key), key)
    return tree


def _override_value(text: str, key: str) -> Any:
    """An override's value: YAML where it reads as YAML, else the text itself ({id}_labels.png, *.jpg)."""
    try:
        return load_yaml(text, key)
    except ConfigError:
        return text


def _set(tree: Any, keys: list[str], value: Any, whole: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        slot: Any = key
        if isinstance(tree, list):
            if not key.isdecimal() or len(key) > 9 or int(key) > len(tree):
                raise ConfigError(f"{whole}: expected an index from 0 to {len(tree)}, got {key!r}")
            slot = int(key)
            if slot == len(tree):
                tree.append(None)
        elif not isinstance(tree, dict):
            raise ConfigError(f"{whole}: {'.'.join(keys[:depth])} is a {type(tree).__name__}, it has no field {key!r}")
        if last:
            tree[slot] = value
            return
        if (tree.get(slot) if isinstance(tree, dict) else tree[slot]) is None:
            tree[slot] = [] if keys[depth + 1].isdecimal() else {}
        tree = tree[slot]


def _message(kind: type[Section], error: ValidationError) -> str:
    lines: dict[str, list[str]] = {}
    ends: dict[str, str] = {}
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"] if part not in UNION_TAGS]
        if item["type"] == "too_short" and item["input"]:
            continue  # pydantic counts only the items that are right
        if item["type"] == "extra_forbidden":
            where, key = ".".join(_without_tags(path[:-1])), path[-1]
            close = difflib.get_close_matches(key, _fields_at(kind, path[:-1]), n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            lines[f"unknown key {key!r} in {where or 'the config'}{hint}"] = []
        else:
            where = ".".join(_without_tags(path)) or "config"
            text = item["msg"].removeprefix("Value error, ")
            lines.setdefault(where, []).append(f"{text[0].lower()}{text[1:]}")
            secret = "storage" in path
            got = type(item["input"]).__name__ if secret else _short(item["input"])
            ends[where] = "" if item["type"] in {"missing", "value_error"} else f", got {got}"
    return "; ".join(
        f"{where}: {' or '.join(texts)}{ends[where]}" if texts else where for where, texts in lines.items()
    )


def _short(value: Any) -> str:
    """A value for a message. Of a mapping its keys: the values may be credentials."""
    if isinstance(value, Mapping):
        text = f"a mapping of {', '.join(map(str, value)) or 'nothing'}"
    elif isinstance(value, list | tuple):
        text = f"a list of {len(value)}"
    else:
        text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


# What pydantic puts into the path of a union's error, one for each type that the value could have.
UNION_TAGS = {"int", "float", "constrained-int", "constrained-float", "literal['auto']"}


def _without_tags(path: list[str]) -> list[str]:
    """Pydantic puts the tag of a discriminated union into the path; nobody wrote it there."""
    return [part for index, part in enumerate(path) if not (index and path[index - 1] == "source" and part in SOURCES)]


def _section(annotation: Any, path: list[str]) -> type[Section] | None:
    if not path and isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if isinstance(annotation, type) and issubclass(annotation, Section):
        field = annotation.model_fields.get(path[0])
        return _section(field.annotation, path[1:]) if field else None
    for option in get_args(annotation):
        if path and isinstance(option, type) and issubclass(option, Section):
            tag = option.model_fields.get("format")
            if tag and path[0] in get_args(tag.annotation):
                return _section(option, path[1:])
        found = _section(option, path[1:] if path and path[0].isdecimal() else path)
        if found:
            return found
    return None


def _fields_at(kind: type[Section], path: list[str]) -> list[str]:
    section = _section(kind, path)
    return list(section.model_fields) if section else []


SOURCES: dict[str, type[_AnySource]] = {
    "webdataset": WebdatasetSource,
    "parquet": ParquetSource,
    "files": FilesSource,
    "coco": CocoSource,
    "scenes": ScenesSource,
    "table": TableSource,
}


def describe(kind: type[Section], prefix: str = "") -> list[tuple[str, str, str]]:
    """Every field as (dotted name, default, meaning), nested sections unfolded, for `--help`."""
    rows: list[tuple[str, str, str]] = []
    for name, field in kind.model_fields.items():
        dotted = f"{prefix}{name}"
        if field.annotation is not None and name == "source":
            rows.append((f"{dotted}.format", "required", " | ".join(SOURCES)))
            common = {f"{dotted}.{field}" for field in (*_AnySource.model_fields, "format")}
            rows += describe(_AnySource, f"{dotted}.")
            for tag, kind_of_source in SOURCES.items():
                own = [row for row in describe(kind_of_source, f"{dotted}.") if row[0] not in common]
                rows += [(field, default, f"[{tag}] {text}") for field, default, text in own]
            continue
        section = _section(field.annotation, []) or _section(field.annotation, ["0"])
        if section is not None:
            repeated = ".N." if get_origin(field.annotation) is tuple else "."
            rows += describe(section, f"{dotted}{repeated}")
            continue
        default = "required" if field.is_required() else json.dumps(field.default, default=str)
        rows.append((dotted, default, field.description or ""))
    return rows


def redacted(config: Section) -> dict[str, Any]:
    """The resolved config as plain values with every storage option's value hidden except addresses, and the password
    of an address too."""

    def walk(value: Any, key: str = "") -> Any:
        if key == "storage" and isinstance(value, Mapping):
            return {name: _redact(name, option) for name, option in value.items()}
        if isinstance(value, Mapping):
            return {name: walk(item, name) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [walk(item) for item in value]
        return _without_password(value)

    result: dict[str, Any] = walk(config.model_dump(mode="json"))
    return result


def _redact(name: str, option: Any) -> Any:
    if isinstance(option, Mapping):
        return {key: _redact(key, value) for key, value in option.items()}
    return _without_password(option) if name in ADDRESSES else "***"


ADDRESSES = {"endpoint_url", "region_name", "anon", "use_ssl", "verify"}


def _without_password(value: Any) -> Any:
    """https://user:password@host without the password; abfs://container@account has none."""
    return re.sub(r"(://[^/@:]*:)[^/@]*@", r"\1***@", value) if isinstance(value, str) else value


def source_from(tree: Mapping[str, Any]) -> "SourceConfig":
    """A source section alone, as run.json keeps it. Raises ConfigError."""
    try:
        return SOURCES[tree["format"]].model_validate(dict(tree))  # type: ignore[return-value]
    except (KeyError, ValidationError) as error:
        raise ConfigError(f"not a source: {' '.join(str(error).split())[:300]}") from error
