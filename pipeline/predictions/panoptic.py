"""Panoptic predictions in COCO's form, a JSON file beside a folder of PNGs, held against those of a COCO source."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config import CocoSource, PredictionsConfig
from pipeline.errors import ConfigError, RowError, StorageError, UnreadableError
from pipeline.predictions.base import Found, Predicted, ScoredModel, UnitPredictions
from pipeline.predictions.beside import by_image, failed, open_predictions_uri
from pipeline.sources.base import Sample, Unit
from pipeline.sources.coco import mask_folder
from pipeline.sources.coco_json import check_field, read_elements
from pipeline.sources.objects import ObjectReader, Wanted, below, list_objects, unpack
from pipeline.storage import address, read_file
from pipeline.targets import read_panoptic, segments_of

__all__ = ["PanopticPredictions"]


@dataclass
class PanopticPredictions:
    """The source of `predictions.format: panoptic`. See PredictionSource.

    An image that the JSON lacks has no prediction; `names` are the ids of images that the source lacks. folder: where
    the PNGs are, once `prepare` was called.
    """

    config: PredictionsConfig
    source: CocoSource
    folder: str = ""
    strangers: pa.Array | None = None

    def models(self) -> list[ScoredModel]:
        return [ScoredModel(label=self.config.label, description={"task": "panoptic", "uri": self.config.uri})]

    def prepare(self, plan: pa.Table) -> pa.Table:
        """See PredictionSource. Raises ConfigError where the file is not what COCO describes or has an image twice."""
        config = self.config
        data = read_file(*self._open(config.uri), config.uri, max_bytes=config.max_bytes)
        uri = config.masks or mask_folder(config.uri)
        fs, folder = self._open(uri)
        self.folder = address(fs, folder)
        listed = list_objects(fs, folder)
        texts: dict[str, bytes] = {}
        marks: dict[str, str] = {}
        for place, text, annotation in read_elements(data, config.uri, name="annotations"):
            number = str(check_field(annotation, "image_id", (int, str), place))
            path = below(folder, check_field(annotation, "file_name", (str,), place))
            check_field(annotation, "segments_info", (list,), place)
            if number in texts:
                raise ConfigError(f"{place}: image {number} has an annotation already")
            entry = listed.get(path) if listed and path else None
            size = json.dumps(entry and entry.size_bytes)
            texts[number] = f'{{"size_bytes": {size}, "annotation": {text}}}'.encode()
            marks[number] = entry.fingerprint if entry else ""
        if texts and listed is not None and not listed:
            raise StorageError(f"{uri} does not exist or holds no files (predictions.masks)")
        extended, strangers = by_image(plan, texts, marks=marks)
        self.strangers = None if self.source.limit else strangers
        return extended

    def _open(self, uri: str) -> tuple[Any, str]:
        return open_predictions_uri(self.config, self.source, uri)

    def open_unit(self, unit: Unit, payload: bytes, model: str) -> UnitPredictions:
        fs, folder = self._open(self.folder)
        return _UnitPanoptic(unpack(payload), fs, folder, self.source.max_pixels, ObjectReader(self.config.max_bytes))

    def names(self, model: str) -> pa.Array | None:
        return self.strangers


@dataclass
class _UnitPanoptic:
    """found: the annotation by COCO image id, and how large its PNG is, where that is known."""

    found: Mapping[str, Mapping[str, Any]]
    fs: Any
    folder: str
    max_pixels: int
    reader: ObjectReader

    def find(self, sample: Sample) -> Found | None:
        name = sample.fields["coco_id"]
        if name not in self.found:
            return None
        annotation = self.found[name]["annotation"]
        path = below(self.folder, annotation["file_name"])
        if path is None:
            problem = f"the file name {annotation['file_name']!r} leads out of the folder"
            return failed(name, UnreadableError(problem), "read")
        data = self.reader.read(Wanted(self.fs, path, self.found[name]["size_bytes"]))
        if isinstance(data, RowError):
            return failed(name, data, "read")
        try:
            segment_HW = read_panoptic(data, max_pixels=self.max_pixels)
            segments = segments_of(annotation)
        except RowError as error:
            return failed(name, error, "decode")
        height, width = segment_HW.shape
        predicted = Predicted(segment_HW=segment_HW, segments=tuple(segments))
        return Found(name=name, width=width, height=height, predicted=predicted)

    def unused(self) -> Iterator[Found]:
        return iter(())
