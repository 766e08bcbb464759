"""FiftyOne: a data set as JSON on disk, loaded by
`fo.Dataset.from_dir(dataset_dir=FOLDER, dataset_type=fo.types.FiftyOneDataset)`.

This is FiftyOne's layout whose samples.json holds samples as `Sample.from_dict` takes them; it is the same for all of
its versions, while the newer layout is a copy of one version's database. Label maps and depth lie beside it under
`fields`; masks of instances stand in the JSON as zlib of .npy, cut to their box.
"""

import base64
import hashlib
import io
import zlib
from typing import Any

import numpy as np

from pipeline.errors import SchemaError
from pipeline.export.base import Encoded, Format, Item, Job, Object, Whole, depth_files, only, pretty
from pipeline.masks import encode_label_map

__all__ = ["FiftyOne"]

FURTHEST = 65535


class FiftyOne(Format):
    """The format `fiftyone`."""

    tasks = frozenset({"semantic", "instance", "detection", "panoptic", "depth"})
    needs_images = True

    def encode(self, job: Job, item: Item) -> Encoded:
        encoded = Encoded()
        path = f"{job.root}{item.shown}"
        if item.image is not None:
            path = f"data/{item.name}{item.suffix}"
            encoded.files[path] = item.image
        sample: dict[str, Any] = {
            "filepath": path,
            "tags": [],
            "metadata": {"_cls": "ImageMetadata", "width": item.width, "height": item.height},
            "maskmill_image_id": item.image_id,
            "shard_id": item.row["shard_id"],
            "position": item.row["position"],
        }
        if item.row.get("semantic"):
            label_HW = item.label_map()
            if label_HW is None:
                raise SchemaError("expected a label map, the row has none")
            name = f"fields/segmentation/{item.name}.png"
            encoded.files[name] = encode_label_map(label_HW)
            sample["segmentation"] = _label(item, "Segmentation", "segmentation", mask_path=name)
        if item.row.get("segments") is not None:
            found = [_detection(job, item, one, place) for place, one in enumerate(only(item.objects()))]
            sample["detections"] = {"_cls": "Detections", "detections": found}
        if item.row.get("depth"):
            data, meaning = depth_files(item, job)
            name = f"fields/depth/{item.name}.png"
            encoded.files[name] = data
            sample["depth"] = _label(item, "Heatmap", "depth", map_path=name, range=[0.0, float(FURTHEST)])
            sample["depth_coding"] = meaning
        encoded.line("samples", sample)
        return encoded

    def fold(self, job: Job, out: Whole) -> None:
        names = {str(category.id): category.name for category in job.taxonomy.categories}
        info = {"default_classes": [*names.values()], "default_mask_targets": names}
        info |= {"model": job.model, "model_version": job.version, "taxonomy": job.taxonomy.name}
        out.file("metadata.json", pretty({"name": f"maskmill {job.model}", "media_type": "image", "info": info}))
        with out.spool("samples.json") as file:
            file.write(b'{"samples":[')
            for number, line in enumerate(out.lines("samples")):
                file.write(((",\n" if number else "\n") + line).encode())
            file.write(b"\n]}\n")


def _label(item: Item, kind: str, what: object, **values: Any) -> dict[str, Any]:
    """A label with an id that is the same in every run."""
    number = hashlib.blake2b(f"{item.image_id}\0{what}".encode("utf-8", "replace"), digest_size=12).hexdigest()
    return {"_id": {"$oid": number}, "_cls": kind, "tags": [], **values}


def _detection(job: Job, item: Item, found: Object, place: int) -> dict[str, Any]:
    x, y, w, h = found.bbox
    box = [x / item.width, y / item.height, w / item.width, h / item.height]
    values: dict[str, Any] = {"attributes": {}, "label": job.class_name(found.category_id), "bounding_box": box}
    if found.rle is not None:
        left, top, width, height = map(int, found.bbox)
        buffer = io.BytesIO()
        np.save(buffer, item.mask_of(found)[top : top + height, left : left + width], allow_pickle=False)
        data = base64.b64encode(zlib.compress(buffer.getvalue())).decode()
        values["mask"] = {"$binary": {"base64": data, "subType": "00"}}
    if found.score is not None:
        values["confidence"] = found.score
    return _label(item, "Detection", place, **values, category_id=found.category_id, segment_id=found.id)
