"""PASCAL VOC: palette PNGs of classes and objects, XML of boxes, and the lists of images
(http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html).

Values of SegmentationClass are lines of labelmap.txt: 0 is the background, which the label space has there or which is
put in front; 255 is void. The palette is VOC's own, in which every value has a colour of its own.
"""

import io
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import ConfigError, SchemaError
from pipeline.export.base import Encoded, Format, Item, Job, Object, Whole, only
from pipeline.export.xmltext import text
from pipeline.taxonomy import Taxonomy

__all__ = ["Voc", "voc_classes", "voc_palette"]

VOID = 255
BACKGROUND = "background"
SPLIT = "default.txt"


class Voc(Format):
    """The format `voc`."""

    tasks = frozenset({"semantic", "instance", "panoptic", "detection"})
    needs_images = True

    def check(self, job: Job) -> None:
        super().check(job)
        if len(voc_classes(job.taxonomy)) > VOID:
            raise ConfigError(f"format voc has 8 bits: at most {VOID} classes, {job.taxonomy.name} has more")

    def encode(self, job: Job, item: Item) -> Encoded:
        encoded = Encoded()
        if item.image is not None:
            encoded.files[f"JPEGImages/{item.name}{item.suffix}"] = item.image
        objects = only(item.objects())
        encoded.files[f"Annotations/{item.name}.xml"] = _xml(job, item, objects)
        encoded.line("main", item.name)
        if job.task == "detection" or item.is_empty:
            return encoded
        label_HW = item.label_map()
        if label_HW is None:
            raise SchemaError("expected a label map or segments, the row has neither")
        values = np.full(job.taxonomy.void_id + 1, VOID, np.uint8)
        for value, category_id in enumerate(voc_classes(job.taxonomy)):
            if category_id is not None:
                values[category_id] = value
        class_HW = values[label_HW]
        if job.task == "instance":
            class_HW[label_HW == job.taxonomy.void_id] = 0  # where no object was found
        encoded.files[f"SegmentationClass/{item.name}.png"] = _palette_png(class_HW)
        if job.task != "semantic":
            encoded.files[f"SegmentationObject/{item.name}.png"] = _palette_png(_object_map(item, job.taxonomy))
        encoded.line("segmentation", item.name)
        return encoded

    def fold(self, job: Job, out: Whole) -> None:
        for stream, folder in (("main", "Main"), ("segmentation", "Segmentation")):
            with out.spool(f"ImageSets/{folder}/{SPLIT}") as file:
                for line in out.lines(stream):
                    file.write(f"{line[1:-1]}\n".encode())  # names need no escapes
        names = [
            BACKGROUND if identifier is None else job.class_name(identifier) for identifier in voc_classes(job.taxonomy)
        ]
        colors = voc_palette()
        rows = [f"{name}:{','.join(map(str, colors[value]))}::" for value, name in enumerate(map(_one_line, names))]
        rows.append(f"void:{','.join(map(str, colors[VOID]))}::")
        out.file("labelmap.txt", ("# label:color_rgb:parts:actions\n" + "\n".join(rows) + "\n").encode())


def voc_classes(taxonomy: Taxonomy) -> list[int | None]:
    """Class ids by their value in the PNGs; None is a background that the label space does not have."""
    first = next((c.id for c in taxonomy.categories if c.name.lower() == BACKGROUND), None)
    return [first, *(class_id for class_id in sorted(taxonomy.ids) if class_id != first)]


@cache
def voc_palette() -> tuple[tuple[int, int, int], ...]:
    """VOC's colour map: the bits of a value spread over the three channels, high bits first."""
    colors = []
    for value in range(256):
        rgb = [0, 0, 0]
        for bit in range(8):
            rgb[bit % 3] |= (value >> bit & 1) << (7 - bit // 3)
        colors.append((rgb[0], rgb[1], rgb[2]))
    return tuple(colors)


def _object_map(item: Item, taxonomy: Taxonomy) -> npt.NDArray[np.uint8]:
    """Things from 1 up, 0 elsewhere. Raises SchemaError for more than 8 bits hold."""
    values = [0]
    for found in item.objects():
        values.append(max(values) + 1 if taxonomy.by_id[found.category_id].kind == "thing" else 0)
    if max(values) >= VOID:
        raise SchemaError(f"expected at most {VOID - 1} objects in an image, got {max(values)} (format voc has 8 bits)")
    return np.array(values, np.uint8)[item.segment_map()]


def _palette_png(map_HW: npt.NDArray[Any]) -> bytes:
    image = Image.fromarray(map_HW)
    image.putpalette(np.array(voc_palette(), np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _xml(job: Job, item: Item, objects: list[Object]) -> bytes:
    """Boxes in VOC's terms: pixels counted from 1, both ends part of the box."""
    name = f"{item.name}{item.suffix}" if item.image is not None else item.shown
    lines = [
        "<annotation>",
        f"  <folder>JPEGImages</folder><filename>{text(name)}</filename>",
        f"  <size><width>{item.width}</width><height>{item.height}</height><depth>3</depth></size>",
        f"  <segmented>{int(job.task != 'detection' and not item.is_empty)}</segmented>",
    ]
    # A label map says nothing of single objects, and boxes around classes would be taken for them.
    for found in objects if job.task != "semantic" else []:
        if job.taxonomy.by_id[found.category_id].kind == "thing":
            x, y, w, h = found.bbox
            box = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            corners = "".join(f"<{key}>{value:g}</{key}>" for key, value in box.items())
            lines.append(
                f"  <object><name>{text(job.class_name(found.category_id))}</name><pose>Unspecified</pose>"
                f"<truncated>0</truncated><difficult>0</difficult><bndbox>{corners}</bndbox></object>"
            )
    return ("\n".join([*lines, "</annotation>"]) + "\n").encode()


def _one_line(text: str) -> str:
    """A name for a line whose fields are divided by colons."""
    return "".join(letter if letter.isprintable() else "_" for letter in text).replace(":", "_")
