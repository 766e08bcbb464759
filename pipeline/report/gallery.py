"""Pictures of single images for a report's page: image, target, prediction and error side by side, encoded."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from pipeline.errors import MaskmillError
from pipeline.images import DEFAULT_MAX_PIXELS, decode_image
from pipeline.metrics.depth import DepthOptions
from pipeline.metrics.detection_match import Objects
from pipeline.overlay import Rgb
from pipeline.panels import Panels, depth_panels, image_panel, label_panels, object_panels, panoptic_panels
from pipeline.predictions.base import Found, Predicted
from pipeline.sources.base import Sample
from pipeline.stages.score import Scorer
from pipeline.targets import read_depth, read_instances, read_panoptic, read_segments

__all__ = ["PANELS", "Panel", "Picture", "collect_pictures"]

PANELS = ("image", "target", "prediction", "error")
MIN_SCORE = 0.5
WEBP_QUALITY = 80
MAX_NOTE = 300
# What data that is not as promised raises; a picture goes without that panel then.
BROKEN = (MaskmillError, LookupError, TypeError, ValueError, ArithmeticError)

Made = TypeVar("Made")


class Panel(NamedTuple):
    """name: one of PANELS. data: an encoded picture of type `mime`."""

    name: str
    data: bytes
    mime: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One image of a gallery. caption: its id. value: its figure, None without one. note: what could not be drawn."""

    caption: str
    value: float | None = None
    panels: tuple[Panel, ...] = ()
    note: str = ""


def collect_pictures(
    rows: Sequence[Mapping[str, Any]],
    samples: Iterable[tuple[Sample, int]],
    find: Callable[[Sample], Found | None],
    scorer: Scorer | None,
    *,
    min_score: float = MIN_SCORE,
) -> list[Picture]:
    """One picture for each of `rows` (image_id, value), in their order.

    samples: those of the rows that the source still has, each with the index of its row, in any order; one is held at a
    time. find: the prediction of a sample. scorer: label space, mapping and options of the scores; without one only
    images are drawn. min_score: predicted objects below it are not drawn.
    What cannot be read or does not fit is said in the picture's note. Raises what `samples` and `find` raise.
    """
    pictures: dict[int, Picture] = {}
    for sample, index in samples:
        notes: list[str] = []
        panels = _panels(sample, find(sample), scorer, min_score, notes)
        encoded = [Panel(name, _webp(panels[name]), "image/webp") for name in PANELS if name in panels]
        pictures[index] = _picture(rows[index], encoded, notes)
    return [pictures.get(index) or _picture(row, (), ["not in the source any more"]) for index, row in enumerate(rows)]


def _picture(row: Mapping[str, Any], panels: Sequence[Panel], notes: Sequence[str]) -> Picture:
    note = "; ".join(notes)[:MAX_NOTE]
    return Picture(caption=str(row["image_id"]), value=row.get("value"), panels=tuple(panels), note=note)


def _panels(sample: Sample, found: Found | None, scorer: Scorer | None, min_score: float, notes: list[str]) -> Panels:
    """What can be drawn; the rest is said in `notes`."""

    def attempt(name: str, make: Callable[[], Made]) -> Made | None:
        try:
            return make()
        except BROKEN as error:
            kind = "" if isinstance(error, MaskmillError) else f"{type(error).__name__}: "
            notes.append(f"no {name}: {kind}{' '.join(str(error).split())}")
            return None

    image_HWC = None
    if sample.image or sample.error is not None:  # else the source has targets alone
        image_HWC = attempt("image", lambda: _image(sample, scorer.max_pixels if scorer else DEFAULT_MAX_PIXELS))
    predicted = found.predicted if found else None
    if found is None or predicted is None:
        notes.append(f"no prediction: {found.error}" if found and found.error else "no prediction")
    if found is None or predicted is None or scorer is None:
        return image_panel(image_HWC)

    def draw(target: Any, pred: Predicted | None) -> Panels:
        return _draw(predicted, image_HWC, target, pred, scorer, min_score)

    target = attempt("target", lambda: _target(predicted, found, sample.targets, scorer))
    pred = attempt("prediction", lambda: _pred(predicted, found, scorer))
    panels = attempt("comparison", lambda: draw(target, pred))
    if panels is None:
        panels = (attempt("target", lambda: draw(target, None)) or {}) | (
            attempt("prediction", lambda: draw(None, pred)) or {}
        )
    return panels


def _image(sample: Sample, max_pixels: int) -> Rgb:
    if sample.error is not None:
        raise sample.error
    return decode_image(sample.image, max_pixels=max_pixels)


def _target(predicted: Predicted, found: Found, targets: Mapping[str, bytes], scorer: Scorer) -> Any:
    """The target of the prediction's kind as `_draw` takes it, None where there is none."""
    depth = scorer.options.depth
    if predicted.segment_HW is not None:
        if not {"panoptic", "segments"} <= targets.keys():
            return None
        return read_panoptic(targets["panoptic"], max_pixels=scorer.max_pixels), read_segments(targets["segments"])
    if predicted.label_HW is not None:
        return scorer.semantic_target(targets)
    if predicted.objects is not None and "instances" in targets:
        annotations, width, height = read_instances(targets["instances"])
        width, height = width or found.width, height or found.height
        return Objects.from_annotations(
            annotations, height=height or predicted.objects.height, width=width or predicted.objects.width
        )
    if predicted.depth_HW is not None and "depth" in targets:
        return read_depth(targets["depth"], scale=depth.scale, invalid=depth.invalid, max_pixels=scorer.max_pixels)
    return None


def _pred(predicted: Predicted, found: Found, scorer: Scorer) -> Predicted:
    """The prediction in the label space of the target."""
    objects = predicted.objects
    if objects is None:
        return scorer.mapped(predicted)
    return scorer.mapped(predicted, height=found.height or objects.height, width=found.width or objects.width)


def _draw(
    kind: Predicted, image_HWC: Rgb | None, target: Any, pred: Predicted | None, scorer: Scorer, min_score: float
) -> Panels:
    """kind: the prediction that says which of the drawings it is. target, pred: None where there is none to draw."""
    taxonomy = scorer.target
    if kind.segment_HW is not None:
        side = (pred.segment_HW, pred.segments) if pred and pred.segment_HW is not None else None
        return panoptic_panels(image_HWC, target, side, taxonomy)
    if kind.label_HW is not None:
        return label_panels(image_HWC, target, pred.label_HW if pred else None, taxonomy, scorer.options.ignore)
    if kind.objects is not None:
        return object_panels(image_HWC, target, pred.objects if pred else None, taxonomy, min_score)
    depth = scorer.options.depth
    options = DepthOptions(
        alignment=depth.alignment, min_depth=depth.min_depth, max_depth=depth.max_depth, crop=depth.crop
    )
    return depth_panels(image_HWC, target, pred.depth_HW if pred else None, kind.depth_kind, options)


def _webp(rgb_HWC: Rgb) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb_HWC).save(buffer, "WEBP", quality=WEBP_QUALITY)
    return buffer.getvalue()
