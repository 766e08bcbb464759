"""Review packs: which images are most worth a person's time, by what the table's rows say alone.

A survey reads the rows once, piece by piece, into a few figures of each image; the ranking streams over these and keeps
no more than the images that it chooses. Ties go by shard and position, so that the same table gives the same pack.

Axes: H rows, W columns, K classes, N images.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pycocotools import mask as coco_mask

from pipeline.config_export import ReviewConfig
from pipeline.errors import ConfigError, SchemaError
from pipeline.export.base import Item, Job
from pipeline.export.folder import OutputFolder
from pipeline.export.parts import Piece, read_rows
from pipeline.masks import decode_depth
from pipeline.schema import OK
from pipeline.storage import join, open_fs, storage_errors
from pipeline.tablefiles import row_groups_of
from pipeline.taxonomy import Taxonomy

__all__ = ["Choice", "Survey", "SurveyWork", "rank", "survey_piece"]

# Farthest points are looked for among so many images, those with the smallest hashes of their ids.
CANDIDATES = 20_000
IOU_OF_A_PAIR = 0.5
NEAR = 1.25
KEYS = ["image_id", "shard_id", "position", "width", "height", "status", "error_type"]
MASKS = ["semantic", "segments", "depth"]
FIGURES = pa.schema(
    [
        ("path", pa.string()),
        ("group", pa.int32()),
        ("ordinal", pa.int32()),
        ("image_id", pa.string()),
        ("shard_id", pa.string()),
        ("position", pa.int32()),
        ("error_type", pa.string()),
        ("score", pa.float64()),
        ("classes", pa.list_(pa.int32())),
        ("shares", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One image of a pack: where its row is, how much it is worth a look, and why."""

    path: str
    group: int
    ordinal: int
    image_id: str
    shard_id: str
    position: int
    score: float
    why: str


@dataclass(frozen=True, kw_only=True)
class SurveyWork:
    """What all pieces of a survey share. against: `version` of the other model, `paths` of its files by shard."""

    table: str
    storage: Mapping[str, Any]
    task: str
    taxonomy: Taxonomy
    by: str
    against: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Survey:
    """One piece of a survey, and where its figures go."""

    work: SurveyWork
    piece: Piece
    output: str
    output_storage: Mapping[str, Any]
    name: str


def survey_piece(survey: Survey) -> int:
    """Write the figures of one piece's images; returns how many. Raises StorageError."""
    work = survey.work
    columns = {"uncertainty": ["quality", "segments"], "failed": []}.get(work.by, MASKS)
    others = _others(work, survey.piece) if work.against is not None else {}
    rows: list[dict[str, Any]] = []
    for part in survey.piece.parts:
        for ordinal, row in read_rows(work.table, work.storage, part, [*KEYS, *columns]):
            figures = {name: row[name] for name in ("image_id", "shard_id", "position", "error_type")}
            figures |= {"path": part.path, "group": part.group, "ordinal": ordinal}
            if row["status"] == OK:
                other = others.get((row["shard_id"], row["position"]))
                figures["error_type"] = None
                try:
                    figures |= _figures(work, row, other)
                except SchemaError:  # it cannot be read, and so not be shown to anybody
                    continue
            rows.append(figures)
    data = pa.Table.from_pylist(rows, FIGURES)
    with OutputFolder(survey.output, survey.output_storage) as folder, folder.spool(survey.name) as file:
        pq.write_table(data, file, compression="zstd")
    return len(rows)


def _figures(work: SurveyWork, row: Mapping[str, Any], other: Mapping[str, Any] | None) -> dict[str, Any]:
    if work.by == "uncertainty":
        return {"score": uncertainty(row)}
    if work.by == "disagreement":
        if other is None:
            return {"score": None}
        return {"score": disagreement(_as_item(work, row), _as_item(work, other))}
    if work.by in ("rare", "diversity"):
        shares = class_shares(_as_item(work, row))
        return {"classes": [*shares], "shares": [*shares.values()]}
    return {}


def _as_item(work: SurveyWork, row: Mapping[str, Any]) -> Item:
    return Item(
        number=0,
        name="",
        image_id=row["image_id"],
        width=row["width"],
        height=row["height"],
        row=row,
        taxonomy=work.taxonomy,
        task=work.task,
    )


def _others(work: SurveyWork, piece: Piece) -> dict[tuple[str, int], dict[str, Any]]:
    """The other model's rows of a piece's images, as encoded as the table has them."""
    against = work.against or {}
    wanted: dict[str, set[int]] = {}
    for part in piece.parts:
        for _, row in read_rows(work.table, work.storage, part, ["shard_id", "position"]):
            wanted.setdefault(row["shard_id"], set()).add(row["position"])
    fs, base = open_fs(work.table, work.storage)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted({path for shard in wanted for path in against["paths"].get(shard, ())}):
        with storage_errors(join(work.table, path)), fs.open(join(base, path), "rb") as data:
            file = pq.ParquetFile(data, pre_buffer=False)
            groups = sorted({group for shard in wanted for group in row_groups_of(file, shard)})
            columns = [*KEYS, "model_version", *MASKS]
            for batch in file.iter_batches(16, row_groups=groups, columns=columns, use_threads=False):
                own = pc.equal(batch["model_version"], against["version"])
                for row in batch.filter(pc.and_(own, pc.equal(batch["status"], OK))).to_pylist():
                    if row["position"] in wanted.get(row["shard_id"], ()):
                        found[row["shard_id"], row["position"]] = row
    return found


def uncertainty(row: Mapping[str, Any]) -> float | None:
    """1 - mean largest probability of a label map; of instances the mean distance of their scores to being sure: one of
    0.5 counts 0.5, one of 1 or 0 nothing. None where the row says neither."""
    quality = row.get("quality")
    if quality and quality["mean_max_probability"] is not None:
        value = 1 - float(quality["mean_max_probability"])
        return value if np.isfinite(value) else None
    scores = [segment["score"] for segment in row.get("segments") or () if segment["score"] is not None]
    return float(np.mean([min(score, 1 - score) for score in scores])) if scores else None


def class_shares(item: Item) -> dict[int, float]:
    """Class ids of an image and the share of its pixels that each has, of boxes the share of their areas."""
    pixels: Counter[int] = Counter()
    for found in item.objects():
        pixels[found.category_id] += max(found.area, 1 if found.rle is None else 0)
    whole = item.width * item.height
    return {category_id: pixels[category_id] / whole for category_id in sorted(pixels) if pixels[category_id]}


def disagreement(one: Item, other: Item) -> float:
    """How far two models' rows of one image are apart, 0 to 1.

    Label maps and panoptic segments: 1 - mean IoU of the classes that either has. Instances and boxes: 1 - F1 of pairs
    of one class that overlap by more than half. Depth: the share of pixels that differ by more than a factor of 1.25
    when the medians are made the same. Raises SchemaError where the sizes differ.
    """
    if (one.width, one.height) != (other.width, other.height):
        raise SchemaError("two rows of one image have other sizes")
    if one.row.get("depth") and other.row.get("depth"):
        return _depth_apart(one, other)
    if one.task in ("instance", "detection"):
        return _objects_apart(one, other)
    a_HW, b_HW = one.label_map(), other.label_map()
    if a_HW is None or b_HW is None:
        return 1.0
    void = one.taxonomy.void_id
    ious = []
    for category_id in (set(np.unique(a_HW)) | set(np.unique(b_HW))) - {void}:
        a, b = a_HW == category_id, b_HW == category_id
        ious.append(np.count_nonzero(a & b) / np.count_nonzero(a | b))
    return 1 - float(np.mean(ious)) if ious else 0.0


def _objects_apart(one: Item, other: Item) -> float:
    a, b = one.objects(), other.objects()
    if not a and not b:
        return 0.0
    masked = all(found.rle is not None for found in (*a, *b))

    def code(item: Item, found: Any) -> Any:
        return {"size": [item.height, item.width], "counts": found.rle.encode()} if masked else list(found.bbox)

    pairs, taken = 0, set()
    if a and b:
        iou_NM = coco_mask.iou([code(one, x) for x in a], [code(other, y) for y in b], [0] * len(b))
        for row, found in enumerate(a):
            best = [
                (iou_NM[row][column], -column)
                for column, candidate in enumerate(b)
                if column not in taken
                and candidate.category_id == found.category_id
                and iou_NM[row][column] > IOU_OF_A_PAIR
            ]
            if best:
                taken.add(-max(best)[1])
                pairs += 1
    return 1 - 2 * pairs / (len(a) + len(b))


def _depth_apart(one: Item, other: Item) -> float:
    a_HW, b_HW = (decode_depth(item.row["depth"], width=item.width, height=item.height) for item in (one, other))
    both_HW = np.isfinite(a_HW) & np.isfinite(b_HW) & (a_HW > 0) & (b_HW > 0)
    if not both_HW.any():
        return 1.0
    a, b = a_HW[both_HW] / np.median(a_HW[both_HW]), b_HW[both_HW] / np.median(b_HW[both_HW])
    return float(np.mean(np.maximum(a / b, b / a) > NEAR))


class Stored(Protocol):
    """Where the figures of a survey lie."""

    fs: Any
    base: str
    uri: str


def rank(folder: Stored, names: Sequence[str], review: ReviewConfig, job: Job) -> list[Choice]:
    """The images of the pack, the most worthy first. Raises ConfigError where no row says what is asked for."""

    def rows() -> Iterator[dict[str, Any]]:
        for name in names:
            with storage_errors(join(folder.uri, name)), folder.fs.open(join(folder.base, name), "rb") as data:
                for batch in pq.ParquetFile(data).iter_batches(1024, use_threads=False):
                    yield from batch.to_pylist()

    choices = RANKINGS[review.by](rows, review.n, job)
    if not choices:
        raise ConfigError(f"review.by={review.by}: {EMPTY[review.by]}")
    return choices


Rows = Callable[[], Iterator[dict[str, Any]]]


def _order(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["shard_id"], row["position"]


def _choice(row: Mapping[str, Any], score: float, why: str) -> Choice:
    place = {name: row[name] for name in ("path", "group", "ordinal", "image_id", "shard_id", "position")}
    return Choice(**place, score=round(score, 6), why=why)


def _by_score(rows: Rows, n: int, job: Job, what: str) -> list[Choice]:
    scored = (row for row in rows() if row["score"] is not None)
    best = heapq.nsmallest(n, scored, key=lambda row: (-row["score"], _order(row)))
    return [_choice(row, row["score"], f"{what} {row['score']:.4f}") for row in best]


def _uncertain(rows: Rows, n: int, job: Job) -> list[Choice]:
    return _by_score(rows, n, job, "1 - confidence is")


def _disputed(rows: Rows, n: int, job: Job) -> list[Choice]:
    return _by_score(rows, n, job, "the two models differ by")


def _failed(rows: Rows, n: int, job: Job) -> list[Choice]:
    failed = (row for row in rows() if row["error_type"] is not None)
    return [_choice(row, 1.0, f"failed: {row['error_type']}") for row in heapq.nsmallest(n, failed, key=_order)]


def _rare(rows: Rows, n: int, job: Job) -> list[Choice]:
    """By the sum of inverse frequencies of an image's classes: a class that 3 images have counts 1/3 in each."""
    images_of: Counter[int] = Counter()
    for row in rows():
        images_of.update(row["classes"] or ())

    def score(row: Mapping[str, Any]) -> float:
        return sum(1 / images_of[category_id] for category_id in row["classes"])

    best = heapq.nsmallest(n, (row for row in rows() if row["classes"]), key=lambda row: (-score(row), _order(row)))
    choices = []
    for row in best:
        rarest = min(row["classes"], key=lambda category_id: (images_of[category_id], category_id))
        why = f"has {job.class_name(rarest)}, which {images_of[rarest]} images have"
        choices.append(_choice(row, score(row), why))
    return choices


def _diverse(rows: Rows, n: int, job: Job) -> list[Choice]:
    """Farthest points (Gonzalez 1985) of class shares, in the sum of differences: each image is the one farthest from
    all that were chosen before it, the first the one farthest from the mean."""

    def mark(row: Mapping[str, Any]) -> tuple[bytes, tuple[str, int]]:
        return hashlib.blake2b(row["image_id"].encode("utf-8", "replace"), digest_size=8).digest(), _order(row)

    labelled = (row for row in rows() if row["classes"] is not None)
    found = sorted(heapq.nsmallest(max(CANDIDATES, n), labelled, key=mark), key=_order)
    if not found:
        return []
    places = {category_id: place for place, category_id in enumerate(job.taxonomy.ids)}
    share_NK = np.zeros((len(found), len(places)), np.float32)
    for place, row in enumerate(found):
        share_NK[place, [places[category_id] for category_id in row["classes"]]] = row["shares"]
    distance_N: npt.NDArray[Any] = np.abs(share_NK - share_NK.mean(axis=0)).sum(axis=1)
    nearest_N: npt.NDArray[Any] | None = None
    choices: list[Choice] = []
    while len(choices) < min(n, len(found)):
        place = int(np.argmax(distance_N if nearest_N is None else nearest_N))
        value = float((distance_N if nearest_N is None else nearest_N)[place])
        whom = "the mean image" if nearest_N is None else "the nearest one chosen before"
        choices.append(_choice(found[place], value, f"its class shares differ by {value:.4f} from {whom}"))
        away_N = np.abs(share_NK - share_NK[place]).sum(axis=1)
        nearest_N = away_N if nearest_N is None else np.minimum(nearest_N, away_N)
        nearest_N[place] = -1  # not twice, though others may be as near to it as can be
    return choices


RANKINGS: dict[str, Callable[[Rows, int, Job], list[Choice]]] = {
    "uncertainty": _uncertain,
    "disagreement": _disputed,
    "rare": _rare,
    "failed": _failed,
    "diversity": _diverse,
}
EMPTY = {
    "uncertainty": "no row has a confidence (the quality column, or scores of segments)",
    "disagreement": "no image has rows of both models",
    "rare": "no row has a class",
    "failed": "no row failed",
    "diversity": "no row has classes",
}
