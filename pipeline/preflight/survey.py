"""The images of some units, read and decoded one by one: what fails, how large they are, what that costs one core."""

import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from pipeline.config import AnySource, RefineStage
from pipeline.models.spec import Preprocess
from pipeline.preflight.estimate import Interval, exact, share, total
from pipeline.preflight.sampling import Corpus, Part
from pipeline.sources.base import Sample, Source, UnitEnd, read_unit
from pipeline.stages.decode import Decoded, Decoder
from pipeline.stages.prepare import Prepared

__all__ = ["Failure", "SourceFindings", "Survey", "UnitSurvey", "failures", "source_findings", "survey"]

EXAMPLES = 3
# Prepared images that are kept for the trial of batch budgets.
KEPT_IMAGES = 64
KEPT_BYTES = 256_000_000
# A member of a tar: its header, and its content filled up to whole blocks.
TAR_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One kind of row that fails. examples: image ids with messages."""

    stage: str
    kind: str
    images: int
    examples: tuple[str, ...]


@dataclass(kw_only=True)
class UnitSurvey:
    """What one unit came to. images: looked at. rows: in the unit, None where unknown. sizes: (width, height).

    encoded: bytes of each image that could be read. stored: bytes of images and targets, as an archive holds them.
    cut: how the unit ends before its end. targets: images that have one.
    """

    shard_id: str
    size_bytes: int
    rows: int | None
    images: int = 0
    failed: int = 0
    targets: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    encoded: list[int] = field(default_factory=list)
    stored: int = 0
    cut: str | None = None


@dataclass(kw_only=True)
class Survey:
    """What the units came to. errors: (stage, kind, image_id, message). kept: images prepared for each model.

    decode_s, prepare_s: seconds of one thread for `timed` images, the first one of all left out.
    """

    units: list[UnitSurvey] = field(default_factory=list)
    errors: list[tuple[str, str, str, str]] = field(default_factory=list)
    kept: list[tuple[Prepared, ...]] = field(default_factory=list)
    timed: int = 0
    decode_s: float = 0.0
    prepare_s: float = 0.0


def survey(
    source: Source,
    config: AnySource,
    parts: Sequence[Part],
    preprocesses: Sequence[Preprocess],
    prompts: Sequence[bool],
    refine: Sequence[Sequence[RefineStage]] = (),
) -> Survey:
    """Read and decode what the parts name. preprocesses, prompts, refine: of each model, as `Decoder` takes them."""
    found = Survey()
    threads = torch.get_num_threads()
    # A worker's decoding threads share the cores, so an image's time on one of them is what counts.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(1) as pool:
            decoder = Decoder(
                source,
                preprocesses,
                max_pixels=config.max_pixels,
                pool=pool,
                threads=1,
                targets=True,
                prompts=prompts,
                refine=refine,
            )
            for part in parts:
                found.units.append(_unit(decoder, part, found, math.ceil(KEPT_IMAGES / len(parts))))
    finally:
        torch.set_num_threads(threads)
    return found


def _unit(decoder: Decoder, part: Part, found: Survey, keep: int) -> UnitSurvey:
    unit = part.unit
    result = UnitSurvey(shard_id=unit.shard_id, size_bytes=unit.size_bytes, rows=part.rows)
    nothing_done = [frozenset[int]()] * len(decoder.preprocesses)
    kept = 0
    for sample in read_unit(decoder.source, unit, part.done):
        if isinstance(sample, UnitEnd):
            # The first part of a unit does not tell where it ends.
            if part.rows is None and (unit.stop is None or sample.rows < unit.stop):
                result.rows = sample.rows
            continue
        if sample.error is not None and sample.image_id == f"{unit.shard_id}/!unreadable":
            result.cut = str(sample.error)
        if sample.position == part.last:
            continue
        decoded = decoder.decode(sample, nothing_done)
        _count(result, sample, decoded)
        if decoded.error is not None:
            error = (decoded.error_stage, type(decoded.error).__name__, sample.image_id, str(decoded.error))
            found.errors.append(error)
            continue
        if result.images > 1 or len(found.units):
            found.timed += 1
            found.decode_s += decoded.decode_s
            found.prepare_s += decoded.prepare_s
        prepared = tuple(item for item in decoded.prepared if item is not None)
        if kept < keep and prepared and _kept_bytes(found.kept) + _kept_bytes([prepared]) <= KEPT_BYTES:
            found.kept.append(prepared)
            kept += 1
    return result


def _count(result: UnitSurvey, sample: Sample, decoded: Decoded) -> None:
    result.images += 1
    result.targets += any(kind != "prompts" for kind in sample.targets)
    for data in (sample.image, *sample.targets.values()):
        result.stored += TAR_BLOCK + -(-len(data) // TAR_BLOCK) * TAR_BLOCK
    if sample.image:
        result.encoded.append(len(sample.image))
    if decoded.error is None:
        result.sizes.append((decoded.width, decoded.height))
    else:
        result.failed += 1


def _kept_bytes(kept: Sequence[tuple[Prepared, ...]]) -> int:
    return sum(item.size_bytes for items in kept for item in items)


@dataclass(frozen=True, kw_only=True)
class SourceFindings:
    """What is known of the corpus. Sizes are (width, height), each by its pixels; None where no image could be decoded.

    images, size_bytes, failed_share: of the corpus; size_bytes None where nothing tells. looked_at: images.
    """

    units: int
    images: Interval
    size_bytes: Interval | None
    looked_at: int
    units_looked_at: int
    whole: bool
    failed_share: Interval
    failures: tuple[Failure, ...]
    cut: tuple[tuple[str, str], ...]
    targets_share: float
    median_size: tuple[int, int] | None
    p95_size: tuple[int, int] | None
    largest_size: tuple[int, int] | None
    median_bytes: int | None
    mean_bytes: float | None
    decode_s: float | None
    prepare_s: float | None


def failures(errors: Sequence[tuple[str, str, str, str]]) -> tuple[Failure, ...]:
    """Errors by stage and kind, the most frequent first."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for stage, kind, image_id, message in errors:
        kinds.setdefault((stage, kind), []).append(f"{image_id}: {message}"[:300])
    most = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(
        Failure(stage=stage, kind=kind, images=len(texts), examples=tuple(texts[:EXAMPLES]))
        for (stage, kind), texts in most
    )


def source_findings(corpus: Corpus, found: Survey) -> SourceFindings:
    """The corpus as the sample shows it."""
    looked_at = sum(unit.images for unit in found.units)
    images = _images(corpus, found.units)
    sizes = sorted((size for unit in found.units for size in unit.sizes), key=lambda size: (size[0] * size[1], size))
    encoded = [size for unit in found.units for size in unit.encoded]
    if corpus.size_bytes is not None and corpus.limit is None:
        size_bytes: Interval | None = exact(corpus.size_bytes)
    else:
        size_bytes = images.scaled(statistics.fmean(encoded)) if encoded else None
    return SourceFindings(
        units=corpus.units,
        images=images,
        size_bytes=size_bytes,
        looked_at=looked_at,
        units_looked_at=len(found.units),
        whole=images.exact and looked_at >= images.value,
        failed_share=share([(unit.failed, unit.images) for unit in found.units if unit.images], images.value),
        failures=failures(found.errors),
        cut=tuple((unit.shard_id, unit.cut) for unit in found.units if unit.cut is not None),
        targets_share=sum(unit.targets for unit in found.units) / looked_at if looked_at else 0.0,
        median_size=sizes[len(sizes) // 2] if sizes else None,
        p95_size=sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))] if sizes else None,
        largest_size=sizes[-1] if sizes else None,
        median_bytes=int(statistics.median(encoded)) if encoded else None,
        mean_bytes=statistics.fmean(encoded) if encoded else None,
        decode_s=found.decode_s / found.timed if found.timed else None,
        prepare_s=found.prepare_s / found.timed if found.timed else None,
    )


def _images(corpus: Corpus, units: Sequence[UnitSurvey]) -> Interval:
    """Images in the corpus: as the plan says, and of units that do not say it as those that were looked at hold."""
    if not corpus.unstated:
        return exact(corpus.rows)
    counted = [(_rows(unit), float(unit.size_bytes or 1)) for unit in units]
    if not counted:
        return Interval(math.nan, corpus.rows, math.inf)
    found = total(counted, float(corpus.unstated_bytes or corpus.unstated), corpus.unstated)
    if any(unit.rows is None for unit in units) and found.exact:
        # Every unit was looked at, but of some only the beginning.
        found = Interval(found.value, sum(unit.images for unit in units), found.value * 2)
    most = math.inf if corpus.limit is None else corpus.limit
    value, low, high = (min(most, corpus.rows + bound) for bound in (found.value, found.low, found.high))
    return Interval(value, low, high)


def _rows(unit: UnitSurvey) -> float:
    """Images of a unit; of one that was only begun, as many as its bytes have room for."""
    if unit.rows is not None:
        return float(unit.rows)
    return max(float(unit.images), unit.size_bytes * unit.images / unit.stored if unit.stored else 0.0)
