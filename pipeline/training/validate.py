"""How good a model is on images that it does not learn from: every image once, whatever the number of workers.

Images go through the model in batches that the plan alone makes, and workers share whole batches; what each counts is
merged exactly. So the figures are the same, not nearly the same, for any number of workers.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pipeline.config_train import TargetConfig, ValidationConfig
from pipeline.errors import PredictError, RowError, UnreadableError
from pipeline.metrics.confusion import Confusion
from pipeline.metrics.depth import Depth, DepthOptions
from pipeline.metrics.detection import Detection
from pipeline.metrics.detection_match import Objects
from pipeline.metrics.panoptic import PanopticState
from pipeline.models.load import LoadedModel
from pipeline.models.spec import Prediction, Task
from pipeline.overlay import Rgb
from pipeline.predictions.stored import stored
from pipeline.sources.base import AllBut, UnitEnd
from pipeline.sources.registry import open_source
from pipeline.stages.batching import PixelBatcher
from pipeline.stages.decode import Decoded, Decoder
from pipeline.stages.encode import encode_instances
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import Prepared
from pipeline.taxonomy import Taxonomy
from pipeline.training.order import part_range
from pipeline.training.plan import SourcePlan
from pipeline.training.samples import Failure
from pipeline.training.sheet import (
    Draw,
    Shown,
    draw_depth,
    draw_labels,
    draw_objects,
    draw_segments,
    sheet_places,
    show,
)
from pipeline.training.task_targets import TaskTargets
from pipeline.training.workers import Workers

__all__ = ["HEADLINES", "Scores", "Validator", "finite", "lower_is_better"]

# By task, the figure that tells the best checkpoint.
HEADLINES: Mapping[Task, str] = {
    "semantic": "mIoU",
    "depth": "AbsRel",
    "instance": "segm/AP",
    "detection": "bbox/AP",
    "panoptic": "PQ",
}
ERRORS = {"AbsRel", "SqRel", "SqRel_squared", "RMSE", "RMSElog", "log10", "SILog"}
TILE_PIXELS = 1 << 24


def lower_is_better(figure: str) -> bool:
    """Whether a figure is an error."""
    return figure in ERRORS


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metric states of any number of images; those of the model's task are filled. shown: the sheet's pictures."""

    images: int = 0
    confusion: Confusion | None = None
    panoptic: PanopticState = field(default_factory=PanopticState.empty)
    depth: Depth = field(default_factory=Depth.empty)
    bbox: Detection = field(default_factory=Detection.empty)
    segm: Detection = field(default_factory=Detection.empty)
    failures: tuple[Failure, ...] = ()
    shown: tuple[Shown, ...] = ()

    @classmethod
    def merged(cls, parts: Sequence["Scores"]) -> "Scores":
        """The state of all parts' images together, the same for any order and grouping (but the order of lists)."""
        confusions = [part.confusion for part in parts if part.confusion is not None]
        return cls(
            images=sum(part.images for part in parts),
            confusion=functools.reduce(Confusion.merge, confusions) if confusions else None,
            panoptic=functools.reduce(PanopticState.merge, (part.panoptic for part in parts), PanopticState.empty()),
            depth=functools.reduce(Depth.merge, (part.depth for part in parts), Depth.empty()),
            bbox=Detection.empty().merge(*(part.bbox for part in parts)),
            segm=Detection.empty().merge(*(part.segm for part in parts)),
            failures=tuple(failure for part in parts for failure in part.failures),
            shown=tuple(shown for part in parts for shown in part.shown),
        )

    def to_row(self) -> dict[str, Any]:
        """Plain values; `from_row` gives the same state back."""
        return {
            "images": self.images,
            "confusion": None if self.confusion is None else self.confusion.to_row(),
            "panoptic": self.panoptic.to_row(),
            "depth": self.depth.to_row(),
            "bbox": self.bbox.to_row(),
            "segm": self.segm.to_row(),
            "failures": [[failure.image_id, failure.error_type, failure.message] for failure in self.failures],
            "shown": [shown.to_row() for shown in self.shown],
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Scores":
        return cls(
            images=row["images"],
            confusion=None if row["confusion"] is None else Confusion.from_row(row["confusion"]),
            panoptic=PanopticState.from_row(row["panoptic"]),
            depth=Depth.from_row(row["depth"]),
            bbox=Detection.from_row(row["bbox"]),
            segm=Detection.from_row(row["segm"]),
            failures=tuple(Failure(*failure) for failure in row["failures"]),
            shown=tuple(Shown.from_row(shown) for shown in row["shown"]),
        )

    def figures(self, task: Task, taxonomy: Taxonomy) -> dict[str, float]:
        """The figures by name, per class as `IoU/road`; those without evidence are NaN."""
        if task == "depth":
            return {name: float(value) for name, value in self.depth.compute().items() if isinstance(value, float)}
        if task in ("instance", "detection"):
            kinds = {"bbox": self.bbox} | ({"segm": self.segm} if task == "instance" else {})
            return {
                f"{kind}/{name}": value
                for kind, state in kinds.items()
                for name, value in state.compute().figures().items()
            }
        found = (self.confusion or Confusion.empty(taxonomy)).compute()
        classes = {f"IoU/{taxonomy.by_id[id_].name}": row["IoU"] for id_, row in found["per_class"].items()}
        figures = {name: value for name, value in found.items() if isinstance(value, float)} | classes
        return figures if task == "semantic" else self._panoptic_figures(taxonomy) | figures

    def _panoptic_figures(self, taxonomy: Taxonomy) -> dict[str, float]:
        found = self.panoptic.compute(taxonomy)
        kinds = {"": "All", "_things": "Things", "_stuff": "Stuff"}
        figures = {f"{name}{end}": found[kind][name] for end, kind in kinds.items() for name in ("PQ", "SQ", "RQ")}
        return figures | {f"PQ/{taxonomy.by_id[id_].name}": row["PQ"] for id_, row in found["per_class"].items()}


class Validator:
    """Scores a model on the images of a plan. threads: that decode and score."""

    def __init__(
        self,
        config: ValidationConfig,
        target: TargetConfig,
        plan: SourcePlan,
        model: LoadedModel,
        *,
        device: torch.device,
        threads: int,
    ) -> None:
        """model: its module is not used. Raises ConfigError where the targets do not fit the model's label space."""
        self.plan = plan
        self.model = model
        self._batch_images = config.batch_images
        self._source = config.source
        self._targets = TaskTargets(
            target, config.source, model.spec.task, model.taxonomy, background=model.spec.background
        )
        depth = target.depth
        self._depth = DepthOptions(min_depth=depth.min_depth, max_depth=depth.max_depth, alignment=config.alignment)
        self._device = device
        self._threads = threads
        self._sheet_places = frozenset(sheet_places(plan.images, config.sheet_images))

    def score(self, module: nn.Module, workers: Workers) -> Scores:
        """Score a module (put into evaluation mode while it lasts); every worker gets the whole state."""
        training = [child for child in module.modules() if child.training]
        module.eval()
        try:
            own = self._own(module, workers)
        finally:
            for child in training:
                child.training = True
        return Scores.merged([Scores.from_row(row) for row in workers.gather(own.to_row())])

    def _own(self, module: nn.Module, workers: Workers) -> Scores:
        model = replace(self.model, module=module, compile=False)
        predict = Predict(model, device=self._device, batch_pixels=2**62, tile_pixels=TILE_PIXELS)
        batches = part_range(-(-self.plan.images // self._batch_images), workers.rank, workers.size)
        first, stop = (min(at * self._batch_images, self.plan.images) for at in (batches.start, batches.stop))
        parts: list[Scores] = []
        with ThreadPoolExecutor(self._threads, "maskmill-decode", torch.set_num_threads, (1,)) as pool:
            places = self._decoded(pool, first, stop)
            for _, members in itertools.groupby(places, lambda pair: pair[0] // self._batch_images):
                # Merged batch by batch: a state is as large as the label space, not as the images.
                parts.append(Scores.merged([*self._batch(predict, pool, [*members])]))
        return Scores.merged(parts)

    def _decoded(self, pool: Executor, first: int, stop: int) -> Iterator[tuple[int, Decoded]]:
        """The images of places first to stop of the plan, each with its place; what does not come is failed."""
        decoder = Decoder(
            open_source(self._source),
            [self.model.preprocess],
            max_pixels=self._source.max_pixels,
            pool=pool,
            threads=self._threads,
            targets=True,
            prompts=[self.model.spec.prompts],
            refine=[self.model.refine],
        )
        for unit, rows, start in zip(
            self.plan.units, self.plan.rows, itertools.accumulate(self.plan.rows, initial=0), strict=False
        ):
            wanted = set(range(max(0, first - start), min(rows, stop - start)))
            if not wanted:
                continue
            error: RowError = UnreadableError(f"{unit.shard_id} has fewer images than were planned")
            for item in decoder.stream(unit, [AllBut(wanted, rows)]):
                if isinstance(item, UnitEnd):
                    continue
                error = item.error or error
                if item.position in wanted:
                    wanted.remove(item.position)
                    yield start + item.position, item
            for position in sorted(wanted):
                missing = Decoded(image_id=f"{unit.shard_id}/!{position}", shard_id=unit.shard_id, position=position)
                yield start + position, replace(missing, error=error)

    def _batch(self, predict: Predict, pool: Executor, members: list[tuple[int, Decoded]]) -> Iterator[Scores]:
        """Scores of the images that one batch has, those of one padded size in one forward pass."""
        batcher = PixelBatcher[_Member](lambda: 2**62)
        for place, decoded in members:
            if decoded.error is not None or decoded.prepared[0] is None:
                error = decoded.error or PredictError("it was not prepared")
                yield self._failed(place, decoded, None, error)
            else:
                batcher.add(_Member(place, decoded, decoded.prepared[0]))
        for group in batcher.flush():
            results = predict([member.prepared for member in group])
            yield from pool.map(self._score, group, results)

    def _score(self, member: "_Member", prediction: Prediction | RowError) -> Scores:
        place, decoded = member.place, member.decoded
        try:
            if isinstance(prediction, RowError):
                raise prediction
            scores, draw = self._states(decoded, prediction)
        except RowError as error:
            return self._failed(place, decoded, member.image, error)
        if place not in self._sheet_places:
            return scores
        return replace(scores, shown=(show(place, decoded.image_id, member.image, draw),))

    def _failed(self, place: int, decoded: Decoded, image_HWC: Rgb | None, error: RowError) -> Scores:
        wanted = place in self._sheet_places
        return Scores(
            failures=(Failure.of(decoded.image_id, error),),
            shown=(show(place, decoded.image_id, image_HWC, error),) if wanted else (),
        )

    def _states(self, decoded: Decoded, prediction: Prediction) -> tuple[Scores, Draw]:
        """The scores of one image, and how it is drawn."""
        targets, taxonomy = decoded.targets, self.model.taxonomy
        if self.model.spec.task == "panoptic":
            return self._panoptic_states(decoded, prediction)
        if prediction.label_HW is not None:
            target_HW = self._targets.label_map(targets)
            confusion = Confusion.from_maps(target_HW, prediction.label_HW, taxonomy, ignore=taxonomy.void_ids)
            draw = functools.partial(draw_labels, confusion, target_HW, prediction.label_HW, taxonomy)
            return Scores(images=1, confusion=confusion), draw
        if prediction.depth_HW is not None:
            kind: Any = prediction.depth_kind
            depth_HW = self._targets.depth(targets)
            depth = Depth.from_image(prediction.depth_HW, depth_HW, self._depth, kind)
            draw = functools.partial(draw_depth, depth, depth_HW, prediction.depth_HW, kind, self._depth)
            return Scores(images=1, depth=depth), draw
        if prediction.instances is None:
            raise PredictError("the model gave no prediction")
        height, width = decoded.height, decoded.width
        segments = encode_instances(prediction.instances, width=width, height=height)
        known = [segment for segment in segments if segment["category_id"] in taxonomy.by_id]
        masked = self.model.spec.task == "instance"
        pred = Objects.from_segments(known, height=height, width=width, masked=masked)
        annotations = self._targets.annotations(targets, height=height, width=width)
        target = Objects.from_annotations(annotations, height=height, width=width)
        scores = Scores(
            images=1,
            bbox=Detection.from_image(decoded.image_id, pred, target, "bbox"),
            segm=Detection.from_image(decoded.image_id, pred, target, "segm") if masked else Detection.empty(),
        )
        return scores, functools.partial(draw_objects, target, pred, taxonomy)

    def _panoptic_states(self, decoded: Decoded, prediction: Prediction) -> tuple[Scores, Draw]:
        taxonomy = self.model.taxonomy
        if prediction.label_HW is None or prediction.instances is None:
            raise PredictError("the model gave no label map and segments")
        size = {"width": decoded.width, "height": decoded.height}
        row = {**size, "segments": encode_instances(prediction.instances, **size)}
        pred = stored(row, "panoptic", label_HW=prediction.label_HW)
        target_HW, segments = self._targets.panoptic(decoded.targets)
        sides = ((target_HW, segments), (pred.segment_HW, pred.segments))
        panoptic = PanopticState.from_segments(*sides[0], *sides[1], taxonomy)  # type: ignore[arg-type]
        label_HW = self._targets.label_map(decoded.targets)
        confusion = Confusion.from_maps(label_HW, prediction.label_HW, taxonomy, ignore=taxonomy.void_ids)
        draw = functools.partial(draw_segments, panoptic, *sides, taxonomy)  # type: ignore[arg-type]
        return Scores(images=1, confusion=confusion, panoptic=panoptic), draw


@dataclass(frozen=True, slots=True)
class _Member:
    place: int
    decoded: Decoded
    prepared: Prepared

    @property
    def padded(self) -> tuple[int, int]:
        return self.prepared.padded

    @property
    def image(self) -> Rgb:
        """As the model gets it: resized already."""
        image_HWC: Rgb = self.prepared.image_CHW.permute(1, 2, 0).numpy()
        return image_HWC


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Figures as JSON takes them: what has no evidence is null."""
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}
