"""One setting measured on a sample of a corpus: seconds of the model, and how far its labels are from those in fp32."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch

from pipeline.agreement import Agreement
from pipeline.config import LabelConfig
from pipeline.errors import ConfigError, MaskmillError, RowError, StorageError
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.spec import Prediction
from pipeline.predictions.stored import stored
from pipeline.preflight.memory import core_count
from pipeline.preflight.sampling import choose
from pipeline.preflight.trial import best_budget, trial
from pipeline.sources.base import Sample, Unit, UnitEnd, read_unit
from pipeline.sources.registry import open_source
from pipeline.stages.batching import PixelBatcher
from pipeline.stages.decode import Decoded, Decoder
from pipeline.stages.encode import encode
from pipeline.stages.predict import Predict, choose_device, default_batch_pixels
from pipeline.stages.prepare import Prepared
from pipeline.taxonomy import Taxonomy
from pipeline.tune.search import Failed, Outcome, Timed
from pipeline.tune.settings import Context, Setting

__all__ = ["Tuner"]

# Of the encoded sample.
KEPT_BYTES = 512_000_000
PASSES = 3
# A pass that takes longer is not timed again.
LONG_S = 8.0
BUDGET_TRIAL_S = 20.0
# What is compared is what labels are made from, whatever the table would hold of them: zstd is the quickest.
FORM: Literal["zstd"] = "zstd"


class _Member:
    """An image in its batch. at: its place in the sample."""

    def __init__(self, at: int, prepared: Prepared) -> None:
        self.at = at
        self.prepared = prepared

    @property
    def padded(self) -> tuple[int, int]:
        return self.prepared.padded


class Tuner:
    """The sample of one model, its labels in fp32, and what measures other settings against them. One thread."""

    def __init__(self, config: LabelConfig, model: int, units: Sequence[Unit], *, images: int, seed: int) -> None:
        """model: which of the config's. units: what the sample is of. images: of each unit at most.

        Raises ConfigError where no image can be read, and what `load_model` raises.
        """
        self.config = config
        self.model = model
        self.device = choose_device()
        self.source = open_source(config.source)
        self.samples = list(self._read(units, images, seed))
        if not self.samples:
            raise ConfigError("the sample has no image that can be read; look at `maskmill preflight`")
        self.start = Setting().with_options(precision="fp32")
        self._reference: list[dict[str, Any] | None] = []
        self._taxonomy: Taxonomy | None = None

    def _read(self, units: Sequence[Unit], images: int, seed: int) -> Iterator[Sample]:
        left = KEPT_BYTES
        for unit in units:
            part = choose(self.source, unit, images, seed)
            for sample in read_unit(self.source, part.unit, part.done):
                if isinstance(sample, UnitEnd) or sample.error is not None or sample.position == part.last:
                    continue
                left -= len(sample.image)
                if left < 0:
                    return
                yield sample

    def context(self) -> Context:
        """What there is to choose from for this model here. Raises what `load_model` raises."""
        model = self._load(Setting())
        sizes = Counter((item.frame.prepared_height, item.frame.prepared_width) for _, item in self._prepared(model))
        if not sizes:
            raise ConfigError("no image of the sample can be decoded; look at `maskmill preflight`")
        return Context(
            accelerator=self.device.type != "cpu",
            cores=core_count(),
            threads=self._threads(Setting()),
            size=sizes.most_common(1)[0][0],
            resize=model.preprocess.resize,
            max_size=model.preprocess.max_size,
            channels_last=model.channels_last,
            precision=model.precision,
            compile=model.compile,
        )

    def measure(self, setting: Setting) -> Outcome:
        """Label the sample under a setting, several times. What goes wrong is a Failed."""
        try:
            if not self._reference:
                self._refer()
            return self._measure(setting)
        except StorageError:
            raise
        except (MaskmillError, RuntimeError, MemoryError, ValueError, TypeError, NotImplementedError) as error:
            return Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        finally:
            torch._dynamo.reset()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def budget(self, setting: Setting) -> int | None:
        """The smallest batch budget that is about as fast as the best, under a setting; None where none works."""
        try:
            model = self._load(setting)
            prepared = [item for _, item in self._prepared(model)]
            found = trial(
                model,
                prepared,
                device=self.device,
                own_pixels=self._pixels(setting),
                base_pixels=max(item.padded[0] * item.padded[1] for item in prepared),
                tile_pixels=self.config.resources.tile_pixels,
                most_images=self.config.output.rows_per_file,
                seconds=BUDGET_TRIAL_S,
            )
        except MaskmillError:
            return None
        return best_budget([found])

    def _refer(self) -> None:
        """The labels in fp32, which the others are held against. cuDNN's convolutions use TF32 by default."""
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            model = self._load(self.start)
            self._taxonomy = model.taxonomy
            predict, batches = self._ready(model, self.start)
            self._reference = self._rows(self._predicted(predict, batches), model)
        finally:
            torch.backends.cudnn.allow_tf32 = before
        if not any(row is not None for row in self._reference):
            self._reference = []
            raise ConfigError("no image of the sample can be labelled in fp32; look at `maskmill preflight`")

    def _measure(self, setting: Setting) -> Timed:
        model = self._load(setting)
        began = time.perf_counter()
        predict, batches = self._ready(model, setting)
        predict.check()
        rows = self._rows(self._predicted(predict, batches), model)
        first_s = time.perf_counter() - began
        best_s = float("inf")
        for _ in range(PASSES):
            started = time.perf_counter()
            self._predicted(predict, batches)
            best_s = min(best_s, time.perf_counter() - started)
            if best_s > LONG_S:
                break
        agreement, failed = self._agreement(rows, model)
        images = sum(len(batch) for batch in batches)
        taxonomy = self._taxonomy or model.taxonomy
        return Timed(
            seconds_per_image=best_s / images,
            setup_s=max(0.0, first_s - best_s),
            images=images,
            loss=agreement.loss(taxonomy),
            figures=agreement.figures(taxonomy),
            failed=failed,
            equal=agreement.equal,
        )

    def _load(self, setting: Setting) -> LoadedModel:
        given = self.config.models[self.model]
        options = {**given.options, **dict(setting.options)}
        return load_model(
            given.model_copy(update={"options": options}),
            seed=self.config.seed,
            tile_pixels=self.config.resources.tile_pixels,
        )

    def _threads(self, setting: Setting) -> int:
        given = dict(setting.resources).get("torch_threads", self.config.resources.torch_threads)
        return given if isinstance(given, int) else core_count()

    def _pixels(self, setting: Setting) -> int:
        given = dict(setting.resources).get("batch_pixels", self.config.resources.batch_pixels)
        return given if isinstance(given, int) else default_batch_pixels(self.device)

    def _ready(self, model: LoadedModel, setting: Setting) -> tuple[Predict, list[list[_Member]]]:
        """The model on its device, and the sample in the batches that a worker would make of it."""
        torch.set_num_threads(self._threads(setting))
        pixels = self._pixels(setting)
        predict = Predict(model, device=self.device, batch_pixels=pixels, tile_pixels=self.config.resources.tile_pixels)
        batcher = PixelBatcher[_Member](lambda: pixels)
        batches = [batcher.add(_Member(at, item)) for at, item in self._prepared(model)]
        return predict, [batch for batch in [*batches, *batcher.flush()] if batch]

    def _prepared(self, model: LoadedModel) -> Iterator[tuple[int, Prepared]]:
        with ThreadPoolExecutor(max(1, core_count())) as pool:
            decoder = Decoder(
                self.source,
                [model.preprocess],
                max_pixels=self.config.source.max_pixels,
                pool=pool,
                threads=1,
                prompts=[model.spec.prompts],
            )
            nothing_done = [frozenset[int]()]

            def decode(sample: Sample) -> Decoded:
                return decoder.decode(sample, nothing_done)

            for at, decoded in enumerate(pool.map(decode, self.samples)):
                if decoded.error is None and decoded.prepared[0] is not None:
                    yield at, decoded.prepared[0]

    def _predicted(
        self, predict: Predict, batches: Sequence[Sequence[_Member]]
    ) -> list[tuple[_Member, Prediction | RowError]]:
        return [
            pair
            for batch in batches
            for pair in zip(batch, predict([member.prepared for member in batch]), strict=True)
        ]

    def _rows(
        self, predicted: Sequence[tuple[_Member, Prediction | RowError]], model: LoadedModel
    ) -> list[dict[str, Any] | None]:
        """What the table would hold of each image of the sample, None where it failed."""
        rows: list[dict[str, Any] | None] = [None] * len(self.samples)
        for member, prediction in predicted:
            if isinstance(prediction, RowError):
                continue
            width, height = member.prepared.frame.width, member.prepared.frame.height
            columns = encode(prediction, FORM, width=width, height=height)
            rows[member.at] = {"width": width, "height": height, "task": model.spec.task, **columns}
        return rows

    def _agreement(self, rows: Sequence[dict[str, Any] | None], model: LoadedModel) -> tuple[Agreement, int]:
        """Over the images that both have, folded as one data set; and how many only fp32 has."""
        total, failed = Agreement(), 0
        for reference, row in zip(self._reference, rows, strict=True):
            if reference is None:
                continue
            if row is None:
                failed += 1
                continue
            task = model.spec.task
            total = total.merge(Agreement.of(stored(reference, task), stored(row, task), model.taxonomy))
        return total, failed
