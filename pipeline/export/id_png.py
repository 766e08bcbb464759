"""Maps of ids as PNGs in the names of Cityscapes: labelIds, trainIds, instanceIds, and depth in 16 bits.

https://github.com/mcordts/cityscapesScripts: label ids with 0 for unlabelled, train ids with 255, and instance ids of
id * 1000 + n. Other label spaces keep their own ids, with void as the table has it.
"""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import ConfigError, SchemaError
from pipeline.export.base import Encoded, Format, Item, Job, Whole, depth_files, pretty
from pipeline.masks import encode_label_map
from pipeline.taxonomy import Taxonomy, load_taxonomy
from pipeline.taxonomy_mapping import map_taxonomy

__all__ = ["IdPng", "label_ids", "train_ids"]

LABELS = "gtFine"
UNLABELED = 0
PER_CLASS = 1000
MAX_INSTANCE_ID = 65535


class IdPng(Format):
    """The format `id_png`."""

    tasks = frozenset({"semantic", "panoptic", "instance", "depth"})

    def check(self, job: Job) -> None:
        super().check(job)
        if job.task in ("panoptic", "instance") and (max(job.taxonomy.ids) + 1) * PER_CLASS > MAX_INSTANCE_ID:
            raise ConfigError(
                f"format id_png: instance ids are class * {PER_CLASS} + n in 16 bits, so classes go up to "
                f"{MAX_INSTANCE_ID // PER_CLASS - 1}; {job.taxonomy.name} has {max(job.taxonomy.ids)} "
                "(format=coco_panoptic or coco has room)"
            )

    def encode(self, job: Job, item: Item) -> Encoded:
        encoded = Encoded()
        if item.image is not None:
            encoded.files[f"leftImg8bit/{item.name}_leftImg8bit{item.suffix}"] = item.image
        if item.is_empty:
            return encoded
        if job.task == "depth":
            data, meaning = depth_files(item, job)
            encoded.files[f"depth/{item.name}_depth.png"] = data
            encoded.files[f"depth/{item.name}_depth.json"] = pretty(meaning)
            return encoded
        label_HW = item.label_map()
        if label_HW is None:
            raise SchemaError("expected a label map or segments, the row has neither")
        for what, table in (("labelIds", label_ids(job.taxonomy)), ("trainIds", train_ids(job.taxonomy))):
            if table is not None:
                encoded.files[f"{LABELS}/{item.name}_{LABELS}_{what}.png"] = encode_label_map(table[label_HW])
        if job.task != "semantic":
            instance_HW = _instance_ids(item, job.taxonomy)
            encoded.files[f"{LABELS}/{item.name}_{LABELS}_instanceIds.png"] = _png16(instance_HW)
        return encoded

    def fold(self, job: Job, out: Whole) -> None:
        if job.task != "depth":
            table = label_ids(job.taxonomy)
            classes = [{**category, "id": int(table[category["id"]])} for category in job.categories]
            void = int(table[job.taxonomy.void_id])
            out.file("classes.json", pretty({"taxonomy": job.taxonomy.name, "void": void, "classes": classes}))


def label_ids(taxonomy: Taxonomy) -> npt.NDArray[Any]:
    """Ids of the label space and its void -> what stands in labelIds."""
    identity = np.arange(taxonomy.void_id + 1).astype(taxonomy.dtype)
    if not taxonomy.name.startswith("cityscapes"):
        return identity
    table = identity.copy()
    if taxonomy.name == "cityscapes19":
        mapping = map_taxonomy(taxonomy, load_taxonomy("cityscapes34"))
        table[list(mapping.pairs)] = list(mapping.pairs.values())
    table[taxonomy.void_id] = UNLABELED
    return table


def train_ids(taxonomy: Taxonomy) -> npt.NDArray[np.uint8] | None:
    """Ids of the label space -> train ids, 255 for what is not evaluated; None where it is not Cityscapes'."""
    if not taxonomy.name.startswith("cityscapes"):
        return None
    mapping = map_taxonomy(taxonomy, load_taxonomy("cityscapes19"))
    table = np.full(taxonomy.void_id + 1, 255, np.uint8)
    table[list(mapping.pairs)] = list(mapping.pairs.values())
    return table


def _instance_ids(item: Item, taxonomy: Taxonomy) -> npt.NDArray[np.uint16]:
    """Things: id * 1000 + n, n from 0 for each class; stuff: its id."""
    table = label_ids(taxonomy)
    segment_HW = item.segment_map()
    values = [int(table[taxonomy.void_id])]
    counts: dict[int, int] = {}
    for segment in item.objects():
        number = int(table[segment.category_id])
        if taxonomy.by_id[segment.category_id].kind == "thing":
            n = counts[number] = counts.get(number, -1) + 1
            if n >= PER_CLASS:
                raise SchemaError(f"expected at most {PER_CLASS} instances of a class, got more of {number}")
            number = number * PER_CLASS + n
        values.append(number)
    return np.array(values, np.uint16)[segment_HW]


def _png16(map_HW: npt.NDArray[np.uint16]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(map_HW).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
