"""The configs of `maskmill export` and `maskmill import`."""

from typing import Any, Literal

from pydantic import Field

from pipeline.config import Auto, Count, Section, Storage

__all__ = ["ExportConfig", "FolderConfig", "ImportConfig", "ReviewConfig", "TableConfig"]

ExportFormat = Literal[
    "coco",
    "coco_panoptic",
    "id_png",
    "voc",
    "yolo",
    "webdataset",
    "huggingface",
    "fiftyone",
    "cvat",
    "label_studio",
]
ReviewBy = Literal["uncertainty", "disagreement", "rare", "failed", "diversity"]


class TableConfig(Section):
    uri: str = Field(description="output.uri of a label run")
    model: str | None = Field(None, description="label of the model whose rows go out; default: the first")
    storage: Storage = Field({}, description="fsspec options for the table")


class FolderConfig(Section):
    uri: str = Field(description="the folder to write, local or object storage; empty, or of the same export")
    storage: Storage = Field({}, description="fsspec options for the folder")


class ReviewConfig(Section):
    """The images most worth a person's time instead of all."""

    n: int = Field(200, ge=1, le=1_000_000, description="how many images")
    by: ReviewBy = Field(
        "uncertainty",
        description="uncertainty: least confident; disagreement: two models of the table differ most; rare: classes "
        "that few images have; failed: rows without labels; diversity: class shares that differ most from each other",
    )
    against: str | None = Field(
        None, description="disagreement: label of the other model; default: the table's second one"
    )


class ExportConfig(Section):
    """Write the labels of a table in a format that other tools read; a killed export goes on where it stopped."""

    table: TableConfig = Field(description="what is exported")
    format: ExportFormat = Field(
        description="coco | coco_panoptic | id_png | voc | yolo | webdataset | huggingface | fiftyone | cvat | "
        "label_studio"
    )
    output: FolderConfig = Field(description="where it goes")
    images: bool | Auto = Field(
        "auto",
        description="copy the images from the source; auto: where the format's readers need them (voc, yolo, fiftyone)",
    )
    image_root: str = Field(
        "",
        description="folder or address in front of image names that are not copied, as in s3://bucket/images/ or "
        "/data/local-files/?d=images/",
    )
    source: dict[str, Any] = Field(
        {}, description="fields of the source that differ from run.json: source.uri, source.storage.key, ..."
    )
    polygons: bool = Field(
        False, description="coco, cvat: outlines instead of run lengths; they follow the edges of pixels"
    )
    tolerance: float = Field(
        0.0, ge=0, le=100, description="pixels that an outline may stray from the mask's to have fewer points; 0: exact"
    )
    depth_scale: float | None = Field(
        None,
        gt=0,
        description="metres of one step of depth PNGs (0.001: millimetres, up to 65.5 m); default: the "
        "table's own 16 bits, with scale and offset of each image",
    )
    review: ReviewConfig | None = Field(None, description="a review pack: only the images most worth a look")
    rows_per_piece: int = Field(
        1000, ge=1, le=100_000, description="images in one piece of work, and in one shard of webdataset or huggingface"
    )
    workers: Count | Auto = Field("auto", description="pieces at once; auto: as there are cores")
    ray_address: str | None = Field(
        None, description="Ray cluster to join; default: RAY_ADDRESS, else threads of this process"
    )


class ImportConfig(Section):
    """Read corrections that people made in other tools back as targets for training and evaluation."""

    format: Literal["cvat", "label_studio", "coco", "coco_panoptic", "id_png"] = Field(
        description="cvat: `CVAT for images 1.1`, XML or zip; label_studio: JSON export; coco, coco_panoptic: JSON "
        "(and PNGs); id_png: a folder or zip of label maps"
    )
    uri: str = Field(description="the file or folder with the corrections")
    storage: Storage = Field({}, description="fsspec options for the corrections")
    masks: str | None = Field(None, description="coco_panoptic: folder of the PNGs; default: uri without .json")
    export: FolderConfig | None = Field(
        None,
        description="the export that was corrected: it says the names of files, the label space and the kind of target",
    )
    taxonomy: str | None = Field(
        None, description="label space by name or YAML file; default: the export's, else the COCO file's categories"
    )
    kind: Literal["semantic", "instances", "panoptic"] | None = Field(
        None, description="what the targets are; default: as the exported model's task"
    )
    output: FolderConfig = Field(description="folder of Parquet files, a source of format parquet")
    images: bool = Field(True, description="with an export: put the images beside the targets, as training needs them")
    source: dict[str, Any] = Field({}, description="fields of the images' source that differ from the export's run")
    max_pixels: int = Field(200_000_000, ge=1, description="larger masks are refused before anything is allocated")
    max_bytes: int = Field(2_000_000_000, ge=1, description="larger files of corrections are refused unread")
