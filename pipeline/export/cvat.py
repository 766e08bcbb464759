"""CVAT for images 1.1: one XML of masks, polygons or boxes
(https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/). CVAT matches images by name and labels by name:
the task has to have both before annotations.xml is uploaded to it."""

import json

import numpy as np

from pipeline.export.base import Encoded, Format, Item, Job, Object, Whole, only, rings_of
from pipeline.export.runlengths import encode_runs
from pipeline.export.xmltext import attributes, text

__all__ = ["Cvat"]

FILE = "annotations.xml"


class Cvat(Format):
    """The format `cvat`. The best object of an image has the highest z_order."""

    tasks = frozenset({"semantic", "instance", "detection", "panoptic"})

    def encode(self, job: Job, item: Item) -> Encoded:
        encoded = Encoded()
        if item.image is not None:
            encoded.files[f"images/{item.name}{item.suffix}"] = item.image
        name = f"{item.name}{item.suffix}" if item.image is not None else item.shown
        size = {"width": item.width, "height": item.height}
        objects = only(item.objects())
        shapes = [
            line for place, found in enumerate(objects) for line in _shapes(job, item, found, len(objects) - 1 - place)
        ]
        head = f"<image {attributes(id=item.number - 1, name=name, **size)}>"
        encoded.line("images", "\n".join([f"  {head}", *(f"    {shape}" for shape in shapes), "  </image>"]))
        return encoded

    def fold(self, job: Job, out: Whole) -> None:
        with out.spool(FILE) as file:
            file.write(b'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n')
            file.write(f"  <meta><task><labels>{_labels(job)}</labels></task></meta>\n".encode())
            for line in out.lines("images"):
                file.write(f"{json.loads(line)}\n".encode())
            file.write(b"</annotations>\n")


def _labels(job: Job) -> str:
    return "".join(
        f"<label><name>{text(category.name)}</name><color>#{bytes(category.color).hex()}</color><attributes></attributes>"
        "</label>"
        for category in job.taxonomy.categories
    )


def _shapes(job: Job, item: Item, found: Object, z_order: int) -> list[str]:
    common = {"label": job.class_name(found.category_id), "source": "auto", "occluded": 0}
    if found.rle is None:
        x, y, w, h = found.bbox
        corners = {"xtl": f"{x:.2f}", "ytl": f"{y:.2f}", "xbr": f"{x + w:.2f}", "ybr": f"{y + h:.2f}"}
        return [f"<box {attributes(**common, **corners, z_order=z_order)}></box>"]
    mask_HW = item.mask_of(found)
    if job.polygons:
        rings = rings_of(mask_HW, tolerance=job.tolerance, single=False)
        points = (";".join(f"{x}.0,{y}.0" for x, y in ring.tolist()) for ring in rings)
        return [f"<polygon {attributes(**common, points=line, z_order=z_order)}></polygon>" for line in points]
    left, top, width, height = map(int, found.bbox)
    runs = encode_runs(np.ascontiguousarray(mask_HW[top : top + height, left : left + width]))
    place = {"left": left, "top": top, "width": width, "height": height}
    rle = ", ".join(map(str, runs))
    return [f"<mask {attributes(**common, rle=rle, **place, z_order=z_order)}></mask>"]
