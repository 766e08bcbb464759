"""WebDataset tars (https://github.com/webdataset/webdataset): one shard for each piece, read again by the source of the
same name.

    KEY.jpg          the image, where it is copied
    KEY.seg.png      KEY.panoptic.png  KEY.panoptic.json  KEY.instances.json  KEY.depth.png  KEY.depth.json
    KEY.meta.json    image_id, shard_id, position, model, width, height
"""

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator

import numpy as np

from pipeline.export.base import Encoded, Folder, Format, Item, Job, Whole, depth_files, dumps, only, pretty
from pipeline.masks import encode_label_map, encode_panoptic_png

__all__ = ["Webdataset"]


class Webdataset(Format):
    """The format `webdataset`."""

    tasks = frozenset({"semantic", "instance", "detection", "panoptic", "depth"})

    def encode(self, job: Job, item: Item) -> Encoded:
        encoded = Encoded()
        key = item.name
        if item.image is not None:
            encoded.files[f"{key}{item.suffix}"] = item.image
        meta = {name: item.row[name] for name in ("image_id", "shard_id", "position", "width", "height")}
        meta |= {"model": job.model, "model_version": job.version, "task": job.task}
        encoded.files[f"{key}.meta.json"] = dumps(meta).encode()
        if item.is_empty:
            return encoded
        label_HW = item.label_map() if item.row.get("semantic") else None
        if label_HW is not None:
            encoded.files[f"{key}.seg.png"] = encode_label_map(label_HW)
        if item.row.get("segments") is not None:
            encoded.files |= _segments(job, item, key)
        if item.row.get("depth"):
            data, meaning = depth_files(item, job)
            encoded.files |= {f"{key}.depth.png": data, f"{key}.depth.json": dumps(meaning).encode()}
        return encoded

    @contextlib.contextmanager
    def sink(self, job: Job, index: int, out: Folder) -> Iterator[Callable[[Encoded], None]]:
        with (
            out.spool(f"shard-{index:06d}.tar") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):

            def write(encoded: Encoded) -> None:
                for name, data in encoded.files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

            yield write

    def fold(self, job: Job, out: Whole) -> None:
        out.file("classes.json", pretty(job.taxonomy.describe()))


def _segments(job: Job, item: Item, key: str) -> dict[str, bytes]:
    objects = only(item.objects())
    if job.task == "panoptic":
        segment_HW = np.zeros((item.height, item.width), np.int32)
        for segment in reversed(objects):
            segment_HW[item.mask_of(segment)] = segment.id
        info = [{"id": segment.id, "category_id": segment.category_id} for segment in objects]
        segments = dumps({"segments_info": info}).encode()
        return {f"{key}.panoptic.png": encode_panoptic_png(segment_HW), f"{key}.panoptic.json": segments}
    annotations = [
        {
            "id": number,
            "category_id": found.category_id,
            "bbox": [*found.bbox],
            "area": found.area,
            "iscrowd": 0,
            **({} if found.rle is None else {"segmentation": {"size": [item.height, item.width], "counts": found.rle}}),
            **({} if found.score is None else {"score": found.score}),
        }
        for number, found in enumerate(objects, 1)
    ]
    tree = {"annotations": annotations, "width": item.width, "height": item.height}
    return {f"{key}.instances.json": json.dumps(tree, separators=(",", ":")).encode()}
