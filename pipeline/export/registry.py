"""The formats that an export may have."""

from pipeline.export.base import Format
from pipeline.export.coco import Coco
from pipeline.export.coco_panoptic import CocoPanoptic
from pipeline.export.cvat import Cvat
from pipeline.export.fiftyone import FiftyOne
from pipeline.export.huggingface import HuggingFace
from pipeline.export.id_png import IdPng
from pipeline.export.label_studio import LabelStudio
from pipeline.export.voc import Voc
from pipeline.export.webdataset import Webdataset
from pipeline.export.yolo import Yolo

__all__ = ["FORMATS"]

FORMATS: dict[str, Format] = {
    "coco": Coco(),
    "coco_panoptic": CocoPanoptic(),
    "id_png": IdPng(),
    "voc": Voc(),
    "yolo": Yolo(),
    "webdataset": Webdataset(),
    "huggingface": HuggingFace(),
    "fiftyone": FiftyOne(),
    "cvat": Cvat(),
    "label_studio": LabelStudio(),
}
