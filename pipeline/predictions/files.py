"""Predictions as one file an image, found by a path template: label maps, or depth."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import CocoSource, FilesSource, ParquetSource, PredictionsConfig, SourceConfig
from pipeline.errors import ConfigError, RowError
from pipeline.metrics.depth_align import target_depth
from pipeline.predictions.base import Found, Predicted, ScoredModel, UnitPredictions
from pipeline.predictions.beside import extend_plan, failed, open_predictions_uri
from pipeline.sources.base import Sample, Unit
from pipeline.sources.files import known_captures
from pipeline.sources.objects import ObjectReader, fingerprint, is_missing
from pipeline.sources.templates import ALWAYS, Template, check_template, is_absolute, path_captures
from pipeline.storage import open_fs, relative
from pipeline.targets import NPY, read_label_map, read_npy

__all__ = ["FilePredictions"]


@dataclass
class FilePredictions:
    """The source of `predictions.format: files` (PNGs as `targets.read_label_map` takes them) and `depth`.

    `names` are all files of the template's shape, as paths below the folder that they have in common; None where that
    cannot be listed. Raises ConfigError for a template that cannot work.
    """

    config: PredictionsConfig
    source: SourceConfig
    listed: pa.Array | None = None

    def __post_init__(self) -> None:
        template, source = self.config.uri, self.source
        check_template(template, _captures(source), "predictions.uri")
        if not is_absolute(template) and _folder(source) is None:
            raise ConfigError(
                f"predictions.uri: {template!r} must be absolute: source.format {source.format} has no folder of images"
            )

    def models(self) -> list[ScoredModel]:
        task = "depth" if self.config.format == "depth" else "semantic"
        return [ScoredModel(label=self.config.label, description={"task": task, "uri": self.config.uri})]

    def prepare(self, plan: pa.Table) -> pa.Table:
        """See PredictionSource. Any prediction that changes marks all units. Raises ConfigError where there is none."""
        template = self._template(plan.column("location")[0].as_py() if len(plan) else "")
        listing = template.listing()
        if listing is None:
            return extend_plan(plan, [(fingerprint([template.path]), b"")] * len(plan))
        if not listing:
            raise ConfigError(f"predictions.uri: no file below {template.folder} is like {self.config.uri!r}")
        if self.source.limit is None:
            self.listed = pa.array([relative(template.folder, path) for path in listing], pa.string())
        mark = fingerprint(f"{path} {listing[path].fingerprint}" for path in sorted(listing))
        return extend_plan(plan, [(mark, b"")] * len(plan))

    def _template(self, location: str) -> Template:
        """location: of a unit, which for files is the folder that all images have in common."""
        if is_absolute(self.config.uri):
            return Template(*open_predictions_uri(self.config, self.source, self.config.uri))
        root = location if isinstance(self.source, FilesSource) else str(_folder(self.source))
        fs, path = open_fs(root, self.config.storage or self.source.storage)
        return Template.below(fs, path.rstrip("/"), self.config.uri)

    def open_unit(self, unit: Unit, payload: bytes, model: str) -> UnitPredictions:
        return _UnitFiles(self._template(unit.location), ObjectReader(self.config.max_bytes), self._decode)

    def _decode(self, data: bytes) -> Predicted:
        """Raises RowError."""
        config, max_pixels = self.config, self.source.max_pixels
        if config.format != "depth":
            return Predicted(label_HW=read_label_map(data, max_pixels=max_pixels))
        if data.startswith(NPY):
            return Predicted(depth_HW=read_npy(data, max_pixels=max_pixels), depth_kind=config.kind)
        # No depth is 0 metres; of a relative kind, 0 is the one end of what it has.
        invalid = (0.0,) if config.kind == "metric_m" else ()
        steps_HW = read_label_map(data, max_pixels=max_pixels)
        return Predicted(depth_HW=target_depth(steps_HW, scale=config.scale, invalid=invalid), depth_kind=config.kind)

    def names(self, model: str) -> pa.Array | None:
        return self.listed


def _captures(source: SourceConfig) -> set[str]:
    """What a template may use, besides what every image id gives."""
    if isinstance(source, FilesSource):
        return known_captures(source)
    fields = source.field_columns if isinstance(source, ParquetSource) else ()
    return {*ALWAYS, *fields, *(("coco_id",) if isinstance(source, CocoSource) else ())}


def _folder(source: SourceConfig) -> str | None:
    return source.uri if isinstance(source, FilesSource | CocoSource) else None


@dataclass
class _UnitFiles:
    template: Template
    reader: ObjectReader
    decode: Callable[[bytes], Predicted]

    def find(self, sample: Sample) -> Found | None:
        wanted = self.template.wanted(path_captures(None, sample.image_id) | dict(sample.fields))
        data = None if wanted is None else self.reader.read(wanted)
        if wanted is None or data is None or is_missing(data):
            return None
        name = self.template.name(wanted)
        if isinstance(data, RowError):
            return failed(name, data, "read")
        try:
            predicted = self.decode(data)
        except RowError as error:
            return failed(name, error, "decode")
        map_HW: np.ndarray[Any, Any] | None = predicted.label_HW if predicted.depth_HW is None else predicted.depth_HW
        height, width = (0, 0) if map_HW is None else map_HW.shape
        return Found(name=name, width=width, height=height, predicted=predicted)

    def unused(self) -> Iterator[Found]:
        return iter(())
