"""Label Studio: tasks with predictions, masks as brush strokes (https://labelstud.io/guide/predictions), and the
labelling config that fits them. What comes back keeps `maskmill_image_id`."""

from typing import Any

from pipeline.export.base import Encoded, Format, Item, Job, Object, Whole, only
from pipeline.export.runlengths import encode_brush
from pipeline.export.xmltext import attributes

__all__ = ["LabelStudio"]

FILE = "tasks.json"
CONFIG = "label_config.xml"
# What Label Studio serves of a folder that it was given (LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT is the export's).
LOCAL = "/data/local-files/?d=images/"
BRUSH, BOX = "brush", "box"


class LabelStudio(Format):
    """The format `label_studio`."""

    tasks = frozenset({"semantic", "instance", "detection", "panoptic"})

    def encode(self, job: Job, item: Item) -> Encoded:
        encoded = Encoded()
        address = f"{job.root}{item.shown}"
        if item.image is not None:
            encoded.files[f"images/{item.name}{item.suffix}"] = item.image
            address = f"{job.root or LOCAL}{item.name}{item.suffix}"
        objects = only(item.objects())
        prediction: dict[str, Any] = {
            "model_version": f"{job.model} {job.version}",
            "result": [_result(job, item, found, place) for place, found in enumerate(objects)],
        }
        if item.score is not None:
            prediction["score"] = item.score
        task: dict[str, Any] = {
            "id": item.number,
            "data": {"image": address, "maskmill_image_id": item.image_id},
            "predictions": [prediction] if objects else [],
        }
        encoded.line("tasks", task)
        return encoded

    def fold(self, job: Job, out: Whole) -> None:
        with out.spool(FILE) as file:
            file.write(b"[")
            for number, line in enumerate(out.lines("tasks")):
                file.write(((",\n" if number else "\n") + line).encode())
            file.write(b"\n]\n")
        out.file(CONFIG, _config(job).encode())


def _result(job: Job, item: Item, found: Object, place: int) -> dict[str, Any]:
    control = BOX if found.rle is None else BRUSH
    kind = "rectanglelabels" if found.rle is None else "brushlabels"
    value: dict[str, Any] = {kind: [job.class_name(found.category_id)]}
    if found.rle is None:
        x, y, w, h = found.bbox
        wide, high = 100 / item.width, 100 / item.height
        value |= {"x": x * wide, "y": y * high, "width": w * wide, "height": h * high, "rotation": 0}
    else:
        value |= {"format": "rle", "rle": encode_brush(item.mask_of(found))}
    result: dict[str, Any] = {
        "id": f"{item.number}-{place}",
        "type": kind,
        "from_name": control,
        "to_name": "image",
        "original_width": item.width,
        "original_height": item.height,
        "image_rotation": 0,
        "value": value,
    }
    if found.score is not None:
        result["score"] = found.score
    return result


def _config(job: Job) -> str:
    element, name = ("RectangleLabels", BOX) if job.task == "detection" else ("BrushLabels", BRUSH)
    labels = "\n".join(
        f"    <Label {attributes(value=category.name, background='#' + bytes(category.color).hex())}/>"
        for category in job.taxonomy.categories
    )
    return (
        f'<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <{element} name="{name}" toName="image">\n{labels}\n  </{element}>\n</View>\n'
    )
