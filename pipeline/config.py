"""Run configs as frozen sections, checked whole when built; configfile.py reads them from YAML.

A field is documented beside the field; `maskmill JOB --help` prints these texts.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "REFINES",
    "SOURCES",
    "AnySource",
    "CocoSource",
    "CostConfig",
    "CrfStage",
    "EvaluateConfig",
    "FilesSource",
    "LabelConfig",
    "LogConfig",
    "ModelConfig",
    "OutputConfig",
    "PackConfig",
    "ParquetSource",
    "PredictionsConfig",
    "RefineStage",
    "Resources",
    "ScenesSource",
    "ScoreConfig",
    "Section",
    "SmallRegionsStage",
    "SourceConfig",
    "Storage",
    "SuperpixelsStage",
    "TableSource",
    "TtaConfig",
    "WebdatasetSource",
    "WindowConfig",
    "WorkerResources",
]

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Storage = dict[str, Any]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class AnySource(Section):
    storage: Storage = Field({}, description="fsspec options: key, secret, endpoint_url, anon, client_kwargs, ...")
    limit: int | None = Field(None, ge=1, description="only the first N images, in plan order")
    max_pixels: int = Field(200_000_000, ge=1, description="larger images fail as ImageTooLargeError before decoding")
    max_bytes: int = Field(1_000_000_000, ge=1, description="larger encoded objects fail as ImageTooLargeError unread")


class WebdatasetSource(AnySource):
    format: Literal["webdataset"]
    uri: str = Field(description="tar shards (.tar, .tar.gz): a folder, glob or brace pattern, s3://b/s-{000..127}.tar")


class ParquetSource(AnySource):
    format: Literal["parquet"]
    uri: str = Field(description="Parquet files: a folder, glob or brace pattern; a unit is one row group")
    image_column: str = Field("image", description="a binary column, or a struct {bytes, path}")
    id_column: str | None = Field(None, description="unique string or integer column for image_id; default: row number")
    target_columns: dict[str, str] = Field(
        {},
        description="columns with encoded targets by kind: semantic, panoptic, segments, instances, depth; or prompts "
        "(JSON) of promptable models",
    )
    field_columns: tuple[str, ...] = Field((), description="further columns to carry along, for slicing reports")


class FilesSource(AnySource):
    format: Literal["files"]
    uri: str = Field(description="image files: a folder (searched below), glob or brace pattern")
    images: str | None = Field(
        None,
        description="path template below uri with captures, e.g. leftImg8bit/{split}/{city}/{id}_leftImg8bit.png; "
        "without it {dir}, {stem} and {ext} are captured",
    )
    targets: dict[str, str] = Field(
        {},
        description="target path by kind (semantic, panoptic, segments, instances, depth, prompts), built from the "
        "captures, "
        "below uri or absolute, e.g. semantic: gtFine/{split}/{city}/{id}_gtFine_labelIds.png",
    )
    unit_images: int = Field(256, ge=1, description="images in one unit; enough for a second of work or more")


class CocoSource(AnySource):
    format: Literal["coco"]
    uri: str | None = Field(None, description="folder of the images; evaluate can do without, it reads targets alone")
    instances: str | None = Field(None, description="COCO instances JSON")
    panoptic: str | None = Field(None, description="COCO panoptic JSON")
    prompts: bool = Field(False, description="the boxes of `instances` are prompts of promptable models, too")
    panoptic_masks: str | None = Field(None, description="folder of the panoptic PNGs; default: panoptic without .json")
    unit_images: int = Field(256, ge=1, description="images in one unit; enough for a second of work or more")

    @model_validator(mode="after")
    def _has_annotations(self) -> Self:
        if self.instances is None and self.panoptic is None:
            raise ValueError("source.instances or source.panoptic must be given for format coco")
        return self


class ScenesSource(AnySource):
    format: Literal["scenes"]
    uri: str = Field("scenes://", description="unused: scenes are generated, the same for each seed on every machine")
    count: int = Field(200, ge=1, description="how many scenes")
    start: int = Field(0, ge=0, description="index of the first scene")
    seed: int = Field(0, ge=0, description="another seed, another world")
    width: int = Field(256, ge=8, le=8192, description="pixels")
    height: int = Field(192, ge=8, le=8192, description="pixels")
    unit_images: int = Field(64, ge=1, description="images in one unit; enough for a second of work or more")
    targets: tuple[Literal["semantic", "panoptic", "instances", "depth", "prompts"], ...] = Field(
        ("semantic", "panoptic", "instances", "depth"),
        description="which targets to render; prompts are the boxes of the instances",
    )


class TableSource(AnySource):
    format: Literal["table"]
    uri: str = Field(description="output of a labelling run: what its model said is the target of another's evaluation")
    model: str | None = Field(None, description="label of the model; default: the first")


SourceConfig = Annotated[
    WebdatasetSource | ParquetSource | FilesSource | CocoSource | ScenesSource | TableSource,
    Field(discriminator="format"),
]


class CrfStage(Section):
    """A fully connected CRF (Krähenbühl & Koltun 2011, arXiv:1210.5644); defaults of DeepLab v2's ResNet-101."""

    kind: Literal["crf"]
    iterations: int = Field(10, ge=1, le=100, description="steps of mean field")
    gaussian_compat: float = Field(3.0, ge=0, description="weight of the kernel of places; 0: none")
    gaussian_sdims: float = Field(1.0, ge=0.1, description="its deviation in pixels of the model's input")
    bilateral_compat: float = Field(4.0, ge=0, description="weight of the kernel of places and colours; 0: none")
    bilateral_sdims: float = Field(67.0, ge=0.1, description="its deviation in pixels of the model's input")
    bilateral_schan: float = Field(3.0, ge=0.1, description="its deviation in levels of the 256 of each colour")
    backend: Literal["torch", "pydensecrf"] = Field(
        "torch", description="torch: on the model's device; pydensecrf: the authors' C++, on one core (extra crf)"
    )


class SuperpixelsStage(Section):
    """One label for each superpixel of the image (after Farabet et al. 2013, section 4.1)."""

    kind: Literal["superpixels"]
    method: Literal["slic", "felzenszwalb"] = Field("slic", description="how the image is cut (extra classic)")
    vote: Literal["probabilities", "labels"] = Field(
        "probabilities", description="the class of the highest mean probability, or of the most pixels"
    )
    segments: int = Field(1000, ge=1, description="slic: superpixels of an image, about")
    compactness: float = Field(10.0, gt=0, description="slic: how much nearness counts against likeness of colour")
    scale: float = Field(100.0, gt=0, description="felzenszwalb: higher makes larger superpixels")
    sigma: float = Field(0.5, ge=0, description="deviation in pixels of the blur before it is cut")
    min_size: int = Field(20, ge=1, description="felzenszwalb: pixels of the smallest superpixel")


class SmallRegionsStage(Section):
    """Connected regions that are too small take the label that surrounds them most."""

    kind: Literal["small_regions"]
    min_area: int = Field(64, ge=1, description="regions of fewer pixels of the model's input are dissolved")
    connectivity: Literal[4, 8] = Field(8, description="neighbours of a pixel; with 4 thin diagonals fall to pieces")


RefineStage = Annotated[CrfStage | SuperpixelsStage | SmallRegionsStage, Field(discriminator="kind")]


class WindowConfig(Section):
    size: int = Field(512, ge=32, description="pixels of a side, at every scale")
    overlap: int = Field(128, ge=0, description="pixels that neighbours share; at most half of size")

    @model_validator(mode="after")
    def _overlaps_half(self) -> Self:
        if 2 * self.overlap > self.size:
            raise ValueError(f"overlap must be at most half of size ({self.size}), got {self.overlap}")
        return self


class TtaConfig(Section):
    """Test-time augmentation: the mean of what the model says of several views of an image."""

    scales: tuple[Annotated[float, Field(gt=0.05, le=8)], ...] = Field(
        (1.0,), min_length=1, description="sizes of the model's input; DeepLab: 0.5 to 1.75 by 0.25"
    )
    flip: bool = Field(False, description="each scale mirrored, too")
    window: WindowConfig | None = Field(
        None, description="cut each view into windows that overlap and are blended; default: as `tile_pixels` needs"
    )

    @model_validator(mode="after")
    def _scales_differ(self) -> Self:
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales must differ, got {', '.join(map(str, self.scales))}")
        return self


class ModelConfig(Section):
    name: str | None = Field(None, description="a model of the registry (`maskmill models` lists them)")
    spec: str | None = Field(None, description='a ModelSpec of your own, "package.module:SPEC"')
    weights: str = Field(
        "none",
        description="none (random, seeded) | bundled:NAME | torchvision:ENUM | hf:REPO[@REVISION][:FILE] | "
        "timm:NAME[.TAG] | path or URI of a checkpoint folder, .safetensors or .pt file; a file may end in "
        "#sha256=DIGITS",
    )
    taxonomy: str | None = Field(None, description="label space: a bundled name or a YAML file; default: the model's")
    label: str | None = Field(None, description="name of this model in the table; default: its spec's name")
    storage: Storage = Field({}, description="fsspec options for a weights URI")
    options: dict[str, Any] = Field(
        {},
        description="resize, max_size, pad_multiple, score_threshold, max_segments, low_confidence, precision "
        "(fp32 | tf32 | bf16 | fp16 | int8_dynamic | int8_weight_only), channels_last, compile, and what the model's "
        "build takes; `maskmill tune` tries which of them pay",
    )
    refine: tuple[RefineStage, ...] = Field(
        (), description="stages after a semantic model, in order: crf | superpixels | small_regions"
    )
    tta: TtaConfig | None = Field(None, description="test-time augmentation of a semantic or depth model")

    @model_validator(mode="after")
    def _is_named(self) -> Self:
        if self.name and self.spec:
            raise ValueError("give one of name and spec, not both")
        if not self.name and not self.spec and ":" not in self.weights and "/" not in self.weights:
            raise ValueError("one of name, spec, or a weights URI whose checkpoint names its model must be given")
        return self

    @model_validator(mode="after")
    def _refines_in_order(self) -> Self:
        labels_only = False
        for index, stage in enumerate(self.refine):
            needs = stage.kind == "crf" or (stage.kind == "superpixels" and stage.vote == "probabilities")
            if needs and labels_only:
                raise ValueError(
                    f"refine.{index} ({stage.kind}) needs probabilities, but the stage before gives labels"
                )
            labels_only = not needs
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


class WorkerResources(Section):
    """What one worker of any job is given."""

    workers: Count | Auto = Field("auto", description="worker processes; auto: one per GPU, else one per node")
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto", description="auto: 1 where the cluster has GPUs, else 0"
    )
    cpus_per_worker: float = Field(1.0, ge=0, description="logical CPUs that Ray reserves for one worker")
    memory_per_worker_bytes: int | None = Field(None, ge=1, description="heap that Ray reserves for one worker")
    object_store_bytes: int | None = Field(None, ge=80_000_000, description="local Ray only: size of its object store")
    node_wait_s: float = Field(
        0.0, ge=0, description="how long to wait for nodes that an autoscaler brings; 0: what no node holds is refused"
    )


class Resources(WorkerResources):
    workers: Count | Auto = Field("auto", description="predicting actors; auto: one per GPU, else one per node")
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


class CostConfig(Section):
    """Prices of the whole cluster, which are added up: it is paid for while a run has it, busy or idle."""

    currency: str = Field("USD", min_length=1, max_length=12, description="of the prices; a name, nothing is converted")
    per_node_hour: float = Field(0.0, ge=0, description="price of a node for an hour, where all cost the same")
    per_gpu_hour: float = Field(0.0, ge=0, description="price of a GPU for an hour, where nodes differ")
    per_cpu_hour: float = Field(0.0, ge=0, description="price of a logical CPU for an hour")


class LogConfig(Section):
    path: str | None = Field(
        None, description="file of the driver to append JSON lines to, one for each event; -: standard output"
    )


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
    cost: CostConfig | None = Field(None, description="what the cluster costs; null: nothing is said of it")
    log: LogConfig = Field(LogConfig(), description="structured log of failed rows, retries, commits, worker deaths")
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


SOURCES: dict[str, type[AnySource]] = {
    "webdataset": WebdatasetSource,
    "parquet": ParquetSource,
    "files": FilesSource,
    "coco": CocoSource,
    "scenes": ScenesSource,
    "table": TableSource,
}

REFINES: dict[str, type[Section]] = {
    "crf": CrfStage,
    "superpixels": SuperpixelsStage,
    "small_regions": SmallRegionsStage,
}
