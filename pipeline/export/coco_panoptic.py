"""COCO panoptic: one JSON and a PNG of segment ids for each image (https://cocodataset.org/#format-data, part 4)."""

import numpy as np

from pipeline.export.base import Encoded, Format, Item, Job, Whole
from pipeline.export.coco import coco_image, write_json
from pipeline.masks import encode_panoptic_png

__all__ = ["CocoPanoptic"]

FOLDER = "annotations/panoptic"


class CocoPanoptic(Format):
    """The format `coco_panoptic`. Segments keep the ids that the table has."""

    tasks = frozenset({"panoptic"})

    def encode(self, job: Job, item: Item) -> Encoded:
        encoded = Encoded()
        encoded.line("images", coco_image(item))
        if item.image is not None:
            encoded.files[f"images/{item.name}{item.suffix}"] = item.image
        segment_HW = np.zeros((item.height, item.width), np.int32)
        objects = item.objects()
        for segment in reversed(objects):
            segment_HW[item.mask_of(segment)] = segment.id
        areas = dict(zip(*(part.tolist() for part in np.unique(segment_HW, return_counts=True)), strict=True))
        encoded.line(
            "annotations",
            {
                "image_id": item.number,
                "file_name": f"{item.name}.png",
                # Readers refuse a segment that the PNG does not have.
                "segments_info": [
                    {
                        "id": segment.id,
                        "category_id": segment.category_id,
                        "area": areas[segment.id],
                        "bbox": [int(value) for value in segment.bbox],
                        "iscrowd": 0,
                        **({} if segment.score is None else {"score": segment.score}),
                    }
                    for segment in objects
                    if segment.id in areas
                ],
            },
        )
        encoded.files[f"{FOLDER}/{item.name}.png"] = encode_panoptic_png(segment_HW)
        return encoded

    def fold(self, job: Job, out: Whole) -> None:
        write_json(f"{FOLDER}.json", job, out, numbered=False)
