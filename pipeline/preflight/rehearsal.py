"""A few images labelled by a worker as the run has it, into memory: seconds by stage, bytes by row, what fails."""

import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import LabelConfig, OutputConfig
from pipeline.preflight.memory import peak_bytes, reset_peak
from pipeline.preflight.sampling import Part
from pipeline.preflight.survey import Failure, failures
from pipeline.sources.base import AllBut
from pipeline.stages.label import Labeller
from pipeline.stages.predict import choose_device
from pipeline.stages.score import Scorer
from pipeline.stages.work import STAGES, LabelPlan, WorkItem
from pipeline.storage import join, open_fs
from pipeline.tablefiles import FILE_SCHEMA

__all__ = ["Rehearsal", "first_positions", "rehearse"]

WHOLE_UNIT = 100_000


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What labelling came to. seconds: thread seconds by stage. wall_s: without loading. row_bytes: by model's label.

    peak_bytes, accelerator_bytes: as `Point` has them, of the whole worker.
    """

    images: int
    rows: int
    failed: int
    failures: tuple[Failure, ...]
    seconds: dict[str, float]
    wall_s: float
    row_bytes: dict[str, float]
    peak_bytes: int
    accelerator_bytes: int | None


def first_positions(parts: Sequence[Part], images: int) -> list[Part]:
    """The parts again, so that at most `images` are looked at, the same number of each; one unit has one at least."""
    each = max(1, images // len(parts))
    result = []
    for part in parts[: max(1, images)]:
        if isinstance(part.done, AllBut):
            chosen = sorted(part.done.wanted - {part.last})[:each]
            result.append(replace(part, done=AllBut(set(chosen), part.done.rows)))
        elif part.rows is not None:
            result.append(replace(part, done=AllBut(set(range(min(each, part.rows))), part.rows)))
        else:
            stop = min(each, part.unit.stop or each)
            result.append(replace(part, unit=replace(part.unit, stop=stop)))
    return result


def rehearse(config: LabelConfig, parts: Sequence[Part], scorers: Sequence[Scorer | None], pixels: int) -> Rehearsal:
    """Label the parts. scorers: of each model. pixels: the batch budget. Raises RunError."""
    place = f"memory://maskmill-preflight-{uuid.uuid4().hex}"
    fs, base = open_fs(place)
    labeller = Labeller(
        LabelPlan(
            source=config.source,
            models=config.models,
            output=OutputConfig(uri=place, format=config.output.format, rows_per_file=WHOLE_UNIT),
            resources=config.resources.model_copy(update={"batch_pixels": pixels}),
            versions={},
            scorers=tuple(scorers),
            run_id="preflight",
            seed=config.seed,
        )
    )
    count = len(config.models)
    # The first forward pass of a shape sets things up: it is no part of a long run.
    for _ in labeller.label(_item(first_positions(parts, 1)[0], 0, count)):
        pass
    reset_peak(choose_device())
    started = time.perf_counter()
    try:
        with ThreadPoolExecutor(config.resources.calls_per_worker) as calls:
            each = calls.map(lambda pair: list(labeller.label(_item(pair[1], pair[0], count))), enumerate(parts))
            windows = [window for found in each for window in found]
        wall_s = time.perf_counter() - started
        files = [file for window in windows for file in window.files]
        resident, accelerator = peak_bytes(choose_device())
        empty = _empty_file_bytes()
        row_bytes = {}
        for label in dict.fromkeys(file.model for file in files):
            own = [file for file in files if file.model == label]
            content = sum(file.size_bytes - empty for file in own) / sum(file.rows for file in own)
            row_bytes[label] = max(content, 0.0) + empty / config.output.rows_per_file
        columns = ["error_stage", "error_type", "image_id", "error_message"]
        errors = []
        for file in files:
            if file.failed:
                rows = pq.read_table(pa.BufferReader(fs.cat_file(join(base, file.path))), columns=columns)
                errors += [tuple(row.values()) for row in rows.to_pylist() if row["error_type"] is not None]
    finally:
        if fs.exists(base):
            fs.rm(base, recursive=True)
    return Rehearsal(
        images=sum(window.images for window in windows),
        rows=sum(file.rows for file in files),
        failed=sum(file.failed for file in files),
        failures=failures(errors),
        seconds={stage: sum(window.seconds.get(stage, 0.0) for window in windows) for stage in STAGES},
        wall_s=wall_s,
        row_bytes=row_bytes,
        peak_bytes=resident,
        accelerator_bytes=accelerator,
    )


def _item(part: Part, index: int, models: int) -> WorkItem:
    return WorkItem(index=index, unit=part.unit, done=(part.done,) * models, attempts=({},) * models)


def _empty_file_bytes() -> int:
    sink = pa.BufferOutputStream()
    pq.write_table(FILE_SCHEMA.empty_table(), sink, compression="zstd", compression_level=1)
    return int(sink.getvalue().size)
