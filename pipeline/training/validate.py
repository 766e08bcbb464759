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
from pipeline.models.load import LoadedModel
from pipeline.models.spec import Prediction, Task
from pipeline.sources.base import AllBut, UnitEnd
from pipeline.sources.registry import open_source
from pipeline.stages.batching import PixelBatcher
from pipeline.stages.decode import Decoded, Decoder
from pipeline.stages.encode import encode_instances
from pipeline.stages.predict import Predict, Prepared
from pipeline.taxonomy import Taxonomy
from pipeline.training.order import part_range
from pipeline.training.plan import SourcePlan
from pipeline.training.samples import Failure
from pipeline.training.task_targets import TaskTargets
from pipeline.training.workers import Workers

__all__ = ["HEADLINES", "Scores", "Validator", "finite", "lower_is_better"]

# By task, the figure that tells the best checkpoint.
HEADLINES: Mapping[Task, str] = {"semantic": "mIoU", "depth": "AbsRel", "instance": "segm/AP"}
ERRORS = {"AbsRel", "SqRel", "SqRel_squared", "RMSE", "RMSElog", "log10", "SILog"}
TILE_PIXELS = 1 << 24


def lower_is_better(figure: str) -> bool:
    """Whether a figure is an error."""
    return figure in ERRORS


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metric states of any number of images; the one of the model's task is filled."""

    images: int = 0
    confusion: Confusion | None = None
    depth: Depth = field(default_factory=Depth.empty)
    bbox: Detection = field(default_factory=Detection.empty)
    segm: Detection = field(default_factory=Detection.empty)
    failures: tuple[Failure, ...] = ()

    @classmethod
    def merged(cls, parts: Sequence["Scores"]) -> "Scores":
        """The state of all parts' images together, the same for any order and grouping (but the failures' order)."""
        confusions = [part.confusion for part in parts if part.confusion is not None]
        return cls(
            images=sum(part.images for part in parts),
            confusion=functools.reduce(Confusion.merge, confusions) if confusions else None,
            depth=functools.reduce(Depth.merge, (part.depth for part in parts), Depth.empty()),
            bbox=Detection.empty().merge(*(part.bbox for part in parts)),
            segm=Detection.empty().merge(*(part.segm for part in parts)),
            failures=tuple(failure for part in parts for failure in part.failures),
        )

    def to_row(self) -> dict[str, Any]:
        """Plain values; `from_row` gives the same state back."""
        return {
            "images": self.images,
            "confusion": None if self.confusion is None else self.confusion.to_row(),
            "depth": self.depth.to_row(),
            "bbox": self.bbox.to_row(),
            "segm": self.segm.to_row(),
            "failures": [[failure.image_id, failure.error_type, failure.message] for failure in self.failures],
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Scores":
        return cls(
            images=row["images"],
            confusion=None if row["confusion"] is None else Confusion.from_row(row["confusion"]),
            depth=Depth.from_row(row["depth"]),
            bbox=Detection.from_row(row["bbox"]),
            segm=Detection.from_row(row["segm"]),
            failures=tuple(Failure(*failure) for failure in row["failures"]),
        )

    def figures(self, task: Task, taxonomy: Taxonomy) -> dict[str, float]:
        """The figures by name, per class as `IoU/road`; those without evidence are NaN."""
        if task == "depth":
            return {name: float(value) for name, value in self.depth.compute().items() if isinstance(value, float)}
        if task == "instance":
            kinds = {"bbox": self.bbox, "segm": self.segm}
            return {
                f"{kind}/{name}": value
                for kind, state in kinds.items()
                for name, value in state.compute().figures().items()
            }
        found = (self.confusion or Confusion.empty(taxonomy)).compute()
        classes = {f"IoU/{taxonomy.by_id[id_].name}": row["IoU"] for id_, row in found["per_class"].items()}
        return {name: value for name, value in found.items() if isinstance(value, float)} | classes


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
        self._targets = TaskTargets(target, config.source, model.spec.task, model.taxonomy)
        depth = target.depth
        self._depth = DepthOptions(min_depth=depth.min_depth, max_depth=depth.max_depth)
        self._device = device
        self._threads = threads

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
                parts.append(Scores.merged([*self._batch(predict, pool, [decoded for _, decoded in members])]))
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

    def _batch(self, predict: Predict, pool: Executor, members: list[Decoded]) -> Iterator[Scores]:
        """Scores of the images that one batch has, those of one padded size in one forward pass."""
        batcher = PixelBatcher[_Member](lambda: 2**62)
        for decoded in members:
            if decoded.error is not None or decoded.prepared[0] is None:
                error = decoded.error or PredictError("it was not prepared")
                yield Scores(failures=(Failure.of(decoded.image_id, error),))
            else:
                batcher.add(_Member(decoded, decoded.prepared[0]))
        for group in batcher.flush():
            results = predict([member.prepared for member in group])
            yield from pool.map(self._score, [member.decoded for member in group], results)

    def _score(self, decoded: Decoded, prediction: Prediction | RowError) -> Scores:
        try:
            if isinstance(prediction, RowError):
                raise prediction
            return self._states(decoded, prediction)
        except RowError as error:
            return Scores(failures=(Failure.of(decoded.image_id, error),))

    def _states(self, decoded: Decoded, prediction: Prediction) -> Scores:
        targets = decoded.targets
        if prediction.label_HW is not None:
            target_HW = self._targets.label_map(targets)
            taxonomy = self.model.taxonomy
            confusion = Confusion.from_maps(target_HW, prediction.label_HW, taxonomy, ignore=taxonomy.void_ids)
            return Scores(images=1, confusion=confusion)
        if prediction.depth_HW is not None:
            kind: Any = prediction.depth_kind
            return Scores(
                images=1,
                depth=Depth.from_image(prediction.depth_HW, self._targets.depth(targets), self._depth, kind),
            )
        if prediction.instances is None:
            raise PredictError("the model gave no prediction")
        height, width = decoded.height, decoded.width
        segments = encode_instances(prediction.instances, width=width, height=height)
        known = [segment for segment in segments if segment["category_id"] in self.model.taxonomy.by_id]
        pred = Objects.from_segments(known, height=height, width=width)
        annotations = self._targets.annotations(targets, height=height, width=width)
        target = Objects.from_annotations(annotations, height=height, width=width)
        return Scores(
            images=1,
            bbox=Detection.from_image(decoded.image_id, pred, target, "bbox"),
            segm=Detection.from_image(decoded.image_id, pred, target, "segm"),
        )


@dataclass(frozen=True, slots=True)
class _Member:
    decoded: Decoded
    prepared: Prepared

    @property
    def padded(self) -> tuple[int, int]:
        return self.prepared.padded


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Figures as JSON takes them: what has no evidence is null."""
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}
