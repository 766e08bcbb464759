"""A COCO results file, boxes or masks with scores, held against the instances of a COCO source."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.config import CocoSource, PredictionsConfig
from pipeline.errors import ConfigError, PredictError, RowError
from pipeline.metrics.detection_match import Objects
from pipeline.predictions.base import Found, Predicted, ScoredModel, UnitPredictions
from pipeline.predictions.beside import by_image, failed, open_predictions_uri
from pipeline.sources.base import Sample, Unit
from pipeline.sources.coco_json import check_field, read_elements
from pipeline.sources.objects import unpack
from pipeline.storage import read_file
from pipeline.targets import read_instances

__all__ = ["CocoPredictions"]

SHAPES = ("bbox", "segmentation")
# pycocotools counts the pixels of a mask in 32 bits.
MOST_PIXELS = 2**31
Results = Sequence[Mapping[str, Any]]


@dataclass
class CocoPredictions:
    """The source of `predictions.format: coco`. See PredictionSource.

    The file is a list of results, or an object that has them as `annotations`; each has what the first has, a box, a
    mask or both. An image without results is a prediction of no objects, as COCOeval takes it; `names` are the ids of
    images that the source lacks.
    """

    config: PredictionsConfig
    source: CocoSource
    shapes: tuple[str, ...] = SHAPES[:1]
    strangers: pa.Array | None = None

    def models(self) -> list[ScoredModel]:
        return [ScoredModel(label=self.config.label, description={"task": "instance", "uri": self.config.uri})]

    def prepare(self, plan: pa.Table) -> pa.Table:
        """See PredictionSource. Raises ConfigError that names the first result that is none."""
        uri = self.config.uri
        fs, path = open_predictions_uri(self.config, self.source, uri)
        texts: dict[str, bytearray] = {}
        first: tuple[str, ...] = ()
        elements = read_elements(read_file(fs, path, uri, max_bytes=self.config.max_bytes), uri, name="results")
        for place, text, result in elements:
            shapes = _check(result, place)
            first = first or shapes
            if shapes != first:
                raise ConfigError(f"{place} has {' and '.join(shapes)}, the first result {' and '.join(first)}")
            own = texts.setdefault(str(result["image_id"]), bytearray())
            own += (b", " if own else b"[") + text.encode()
        for own in texts.values():
            own += b"]"
        self.shapes = first or self.shapes
        extended, strangers = by_image(plan, texts, common=" ".join(self.shapes))
        self.strangers = None if self.source.limit else strangers
        return extended

    def open_unit(self, unit: Unit, payload: bytes, model: str) -> UnitPredictions:
        return _UnitResults(unpack(payload), self.shapes)

    def names(self, model: str) -> pa.Array | None:
        return self.strangers


@dataclass(frozen=True)
class _UnitResults:
    """results: by COCO image id. shapes: what each has."""

    results: Mapping[str, Results]
    shapes: tuple[str, ...]

    def find(self, sample: Sample) -> Found | None:
        name = sample.fields["coco_id"]
        results = self.results.get(name, [])
        try:
            width, height = self._size(results, sample)
            boxed, masked = (shape in self.shapes for shape in SHAPES)
            objects = Objects.from_results(results, height=height, width=width, boxed=boxed, masked=masked)
            if masked and width:
                objects = replace(objects, segmentation=objects.rles())
        except RowError as error:
            return failed(name, error, "decode")
        return Found(name=name, width=width, height=height, predicted=Predicted(objects=objects))

    def _size(self, results: Results, sample: Sample) -> tuple[int, int]:
        """What run lengths say, else what the target says of its image; 0 where neither does."""
        masks = [result["segmentation"] for result in results if "segmentation" in self.shapes]
        sizes = {tuple(mask["size"]) for mask in masks if isinstance(mask, dict)}
        if len(sizes) > 1:
            raise PredictError(f"expected masks of one size, height and width, got {sorted(sizes)}"[:300])
        if sizes:
            height, width = sizes.pop()
            return width, height
        if not masks or "instances" not in sample.targets:
            return 0, 0
        _, width, height = read_instances(sample.targets["instances"])
        return width, height

    def unused(self) -> Iterator[Found]:
        return iter(())


def _check(result: Any, place: str) -> tuple[str, ...]:
    """Which of SHAPES a result has. Raises ConfigError where it is none."""
    check_field(result, "image_id", (int, str), place)
    check_field(result, "category_id", (int,), place)
    score = check_field(result, "score", (int, float), place)
    if not _are_finite([score]):
        raise ConfigError(f"{place}: score must be finite, got {score}")
    shapes = tuple(shape for shape in SHAPES if result.get(shape))
    if not shapes:
        raise ConfigError(f"{place} must have a bbox or a segmentation, it has {', '.join(map(str, result))}"[:500])
    bbox, mask = result.get("bbox"), result.get("segmentation")
    if bbox and not (isinstance(bbox, list) and len(bbox) == 4 and _are_finite(bbox)):
        raise ConfigError(f"{place}: bbox must be four numbers, x, y, width and height, got {bbox!r}"[:500])
    if isinstance(mask, dict):
        if not _is_size(mask.get("size")) or not isinstance(mask.get("counts"), str | list):
            raise ConfigError(f"{place}: segmentation must have size, height and width, and counts, got {mask!r}"[:500])
    elif mask and not isinstance(mask, list):
        raise ConfigError(f"{place}: segmentation must be polygons or run lengths, got {mask!r}"[:500])
    return shapes


def _is_size(size: Any) -> bool:
    if not isinstance(size, list) or len(size) != 2 or not all(type(length) is int and length > 0 for length in size):
        return False
    return bool(size[0] * size[1] < MOST_PIXELS)


def _are_finite(values: Sequence[Any]) -> bool:
    try:
        return all(type(value) in (int, float) and math.isfinite(value) for value in values)
    except OverflowError:  # a whole number beyond any float
        return False
