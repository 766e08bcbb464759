"""COCO instances: one JSON of boxes and masks, run lengths or polygons (https://cocodataset.org/#format-data).

Rows of a label map become one annotation for each class, as COCO-Stuff has them. Ids count from 1.
"""

from pipeline.export.base import Encoded, Format, Item, Job, Object, Whole, dumps, only, rings_of

__all__ = ["Coco", "coco_image", "write_json"]

TASKS = frozenset({"semantic", "instance", "detection", "panoptic"})
FILE = "annotations/instances.json"


class Coco(Format):
    """The format `coco`."""

    tasks = TASKS

    def encode(self, job: Job, item: Item) -> Encoded:
        encoded = Encoded()
        encoded.line("images", coco_image(item))
        if item.image is not None:
            encoded.files[f"images/{item.name}{item.suffix}"] = item.image
        for found in only(item.objects()):
            annotation = {
                "image_id": item.number,
                "category_id": found.category_id,
                "bbox": [*found.bbox],
                "area": found.area,
                "iscrowd": 0,
            }
            if found.rle is not None:
                annotation["segmentation"] = _segmentation(job, item, found)
            if found.score is not None:
                annotation["score"] = found.score
            encoded.line("annotations", annotation)
        return encoded

    def fold(self, job: Job, out: Whole) -> None:
        write_json(FILE, job, out, numbered=True)


def _segmentation(job: Job, item: Item, found: Object) -> object:
    if not job.polygons:
        return {"size": [item.height, item.width], "counts": found.rle}
    rings = rings_of(item.mask_of(found), tolerance=job.tolerance, single=False)
    return [ring.ravel().tolist() for ring in rings]


def coco_image(item: Item) -> dict[str, object]:
    """An element of `images`. maskmill_image_id: what the table calls it."""
    name = f"{item.name}{item.suffix}" if item.image is not None else item.shown
    size = {"width": item.width, "height": item.height}
    return {"id": item.number, "file_name": name, **size, "maskmill_image_id": item.image_id}


def write_json(name: str, job: Job, out: Whole, *, numbered: bool) -> None:
    """The lines of `images` and `annotations` as one file. numbered: annotations get ids of their own, from 1."""
    info = {"description": f"labels of {job.model} {job.version}", "version": job.version}
    with out.spool(name) as file:
        file.write(f'{{"info":{dumps(info)},\n"licenses":[],\n"categories":{dumps(job.categories)}'.encode())
        for stream in ("images", "annotations"):
            file.write(f',\n"{stream}":['.encode())
            for number, line in enumerate(out.lines(stream), 1):
                text = f'{{"id":{number},{line[1:]}' if numbered and stream == "annotations" else line
                file.write(((",\n" if number > 1 else "\n") + text).encode())
            file.write(b"]")
        file.write(b"}\n")
