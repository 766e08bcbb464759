"""The formats that corrections may come in."""

from pipeline.corrections.base import Reader
from pipeline.corrections.coco import read_coco_instances, read_coco_panoptic
from pipeline.corrections.cvat import read_cvat
from pipeline.corrections.id_png import read_id_png
from pipeline.corrections.label_studio import read_label_studio

__all__ = ["READERS"]

READERS: dict[str, Reader] = {
    "cvat": read_cvat,
    "label_studio": read_label_studio,
    "coco": read_coco_instances,
    "coco_panoptic": read_coco_panoptic,
    "id_png": read_id_png,
}
