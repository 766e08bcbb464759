"""Encoded samples to what each model takes: decoded once, prepared once per model, errors kept on the sample."""

import time
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial

from pipeline.config import RefineStage
from pipeline.errors import PredictError, RowError
from pipeline.images import decode_image
from pipeline.models.spec import Preprocess, Prompts
from pipeline.prompts import read_prompts
from pipeline.sources.base import Sample, Source, Unit, UnitEnd, read_unit
from pipeline.stages.prepare import Prepared, prepare
from pipeline.stages.stream import map_ordered, read_ahead
from pipeline.stages.superpixels import with_superpixels
from pipeline.stages.waits import Waits

__all__ = ["Decoded", "Decoder"]

# The kind under which a sample carries them, beside its targets.
PROMPTS = "prompts"
READ_AHEAD_SAMPLES = 64
READ_AHEAD_BYTES = 128_000_000
DECODED_BYTES = 512_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One sample after decoding. prepared: one entry per model, None where that model has its row already.

    width, height: of the decoded image, 0 where `error` is set. targets: encoded, empty where nothing is scored.
    read_s, decode_s, prepare_s: thread seconds spent on it. bytes_read: of the encoded image and its targets. faults:
    of the storage, that were survived to read it.
    """

    image_id: str
    shard_id: str
    position: int
    width: int = 0
    height: int = 0
    prepared: tuple[Prepared | None, ...] = ()
    error: RowError | None = None
    error_stage: str = ""
    read_s: float = 0.0
    decode_s: float = 0.0
    prepare_s: float = 0.0
    bytes_read: int = 0
    faults: tuple[str, ...] = ()
    targets: Mapping[str, bytes] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        pixels = sum(item.size_bytes for item in self.prepared if item is not None)
        return pixels + sum(map(len, self.targets.values()))


class Decoder:
    """Reads units of a source and decodes them on a thread pool."""

    def __init__(
        self,
        source: Source,
        preprocesses: Sequence[Preprocess],
        *,
        max_pixels: int,
        pool: Executor,
        threads: int,
        targets: bool = False,
        prompts: Sequence[bool] = (),
        refine: Sequence[Sequence[RefineStage]] = (),
    ) -> None:
        """targets: whether they go along with the images. prompts: which of the models, in the order of `preprocesses`,
        want the samples' prompts in their frames; none of them by default. refine: the stages that follow each of them,
        for which images bring what is found without the model; none by default."""
        self.source = source
        self.targets = targets
        self.preprocesses = tuple(preprocesses)
        self.prompts = tuple(prompts) or (False,) * len(self.preprocesses)
        self.refine = tuple(refine) or ((),) * len(self.preprocesses)
        self.max_pixels = max_pixels
        self._pool = pool
        self._threads = threads

    def stream(
        self, unit: Unit, done: Sequence[Container[int]], waits: Waits | None = None
    ) -> Iterator[Decoded | UnitEnd]:
        """Decode the unit's samples that any model still lacks, in order of position; a UnitEnd comes last.

        done: per model, the positions that need no row. A sample that all of them have is never decoded. waits: of the
        thread that iterates; where it has to wait, it is noted for what.
        """
        waits = waits or Waits()
        samples = read_ahead(
            _timed(self.source, unit, _InAll(done)),
            count=READ_AHEAD_SAMPLES,
            weight=lambda timed: _encoded_bytes(timed[0]) if isinstance(timed[0], Sample) else 0,
            limit=READ_AHEAD_BYTES,
        )
        yield from map_ordered(
            self._pool,
            lambda timed: self._decode_timed(timed, done),
            waits.over("read", samples),
            count=2 * self._threads,
            weight=lambda item: item.size_bytes if isinstance(item, Decoded) else 0,
            limit=DECODED_BYTES,
            waited=partial(waits.add, "decode"),
        )

    def _decode_timed(
        self, timed: tuple[Sample | UnitEnd, float, tuple[str, ...]], done: Sequence[Container[int]]
    ) -> Decoded | UnitEnd:
        item, read_s, faults = timed
        if isinstance(item, UnitEnd):
            return replace(item, faults=faults)
        return replace(self.decode(item, done, read_s), faults=faults, bytes_read=_encoded_bytes(item))

    def decode(self, sample: Sample, done: Sequence[Container[int]], read_s: float = 0.0) -> Decoded:
        """Decode and prepare one sample; what goes wrong is recorded with its stage."""
        if sample.error is not None:
            return _failed(sample, sample.error, "read", read_s)
        started = time.perf_counter()
        try:
            image_HWC = decode_image(sample.image, max_pixels=self.max_pixels)
            prompts = self._prompts(sample, done)
        except RowError as error:
            return _failed(sample, error, "decode", read_s)
        decoded = time.perf_counter()
        try:
            prepared = tuple(
                None if sample.position in rows else prepare(image_HWC, preprocess, prompts if wanted else None)
                for rows, preprocess, wanted in zip(done, self.preprocesses, self.prompts, strict=True)
            )
            prepared = tuple(
                item and with_superpixels(item, stages) for item, stages in zip(prepared, self.refine, strict=True)
            )
        except (RuntimeError, MemoryError, ValueError) as error:  # what resizing raises where a strip becomes a plane
            size = f"{image_HWC.shape[1]}x{image_HWC.shape[0]}"
            problem = PredictError(f"an image of {size} cannot be resized: {' '.join(str(error).split())[:300]}")
            return _failed(sample, problem, "prepare", read_s)
        return Decoded(
            image_id=sample.image_id,
            shard_id=sample.shard_id,
            position=sample.position,
            height=image_HWC.shape[0],
            width=image_HWC.shape[1],
            prepared=prepared,
            read_s=read_s,
            decode_s=decoded - started,
            prepare_s=time.perf_counter() - decoded,
            targets={kind: data for kind, data in sample.targets.items() if self.targets and kind != PROMPTS},
            fields=sample.fields,
        )

    def _prompts(self, sample: Sample, done: Sequence[Container[int]]) -> Prompts | None:
        """The sample's prompts where it has some and a model that still lacks its row wants them. Raises
        TargetMismatchError."""
        asked = any(wanted and sample.position not in rows for rows, wanted in zip(done, self.prompts, strict=True))
        return read_prompts(sample.targets[PROMPTS]) if asked and PROMPTS in sample.targets else None


def _timed(
    source: Source, unit: Unit, done: Container[int]
) -> Iterator[tuple[Sample | UnitEnd, float, tuple[str, ...]]]:
    """Each item of a unit with the seconds that it took to get, and the storage's faults on the way."""
    faults: list[str] = []
    items = read_unit(source, unit, done, on_fault=lambda error: faults.append(str(error)))
    started = time.perf_counter()
    for item in items:
        yield item, time.perf_counter() - started, tuple(faults)
        faults.clear()
        started = time.perf_counter()


def _failed(sample: Sample, error: RowError, stage: str, read_s: float) -> Decoded:
    return Decoded(
        image_id=sample.image_id,
        shard_id=sample.shard_id,
        position=sample.position,
        error=error,
        error_stage=stage,
        read_s=read_s,
        fields=sample.fields,
    )


def _encoded_bytes(sample: Sample) -> int:
    return len(sample.image) + sum(map(len, sample.targets.values()))


class _InAll:
    """Positions that every model has."""

    def __init__(self, done: Sequence[Container[int]]) -> None:
        self.done = done

    def __contains__(self, position: object) -> bool:
        return all(position in rows for rows in self.done)
