"""YOLO segmentation: a text file of polygons for each image and data.yaml
(https://docs.ultralytics.com/datasets/segment/); boxes of detectors in YOLO's box lines.

A line holds one ring, along the mask's outermost pixels, because YOLO's readers fill with borders. The parts and holes
of an object are joined by bridges, which are drawn a pixel wide.
"""

import yaml

from pipeline.export.base import Encoded, Format, Item, Job, Object, Whole, only, rings_of

__all__ = ["Yolo"]

DIGITS = 6
# Where in a pixel a point lies: readers cut off or round what they multiply by the image's size, and get the pixel.
INSIDE = 0.4


class Yolo(Format):
    """The format `yolo`. Class numbers are places in data.yaml; label maps give one object for each part of a class."""

    tasks = frozenset({"semantic", "instance", "panoptic", "detection"})
    needs_images = True

    def encode(self, job: Job, item: Item) -> Encoded:
        places = {category_id: place for place, category_id in enumerate(job.taxonomy.ids)}
        lines = [line for found in only(item.objects()) for line in _lines(job, item, found, places[found.category_id])]
        encoded = Encoded(files={f"labels/{item.name}.txt": "".join(f"{line}\n" for line in lines).encode()})
        if item.image is not None:
            encoded.files[f"images/{item.name}{item.suffix}"] = item.image
        return encoded

    def fold(self, job: Job, out: Whole) -> None:
        tree = {
            "path": ".",
            "train": "images",
            "val": "images",
            "nc": len(job.taxonomy.categories),
            "names": {place: category.name for place, category in enumerate(job.taxonomy.categories)},
        }
        out.file("data.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode())


def _lines(job: Job, item: Item, found: Object, place: int) -> list[str]:
    if found.rle is None:
        x, y, w, h = found.bbox
        numbers = [(x + w / 2) / item.width, (y + h / 2) / item.height, w / item.width, h / item.height]
        return [_line(place, numbers)]
    rings = rings_of(item.mask_of(found), tolerance=job.tolerance, single=job.task != "semantic", on_pixels=True)
    scaled = ((ring + INSIDE) / (item.width, item.height) for ring in rings)
    return [_line(place, ring.ravel().tolist()) for ring in scaled]


def _line(place: int, numbers: list[float]) -> str:
    return " ".join([str(place), *(f"{number:.{DIGITS}f}".rstrip("0").rstrip(".") for number in numbers)])
