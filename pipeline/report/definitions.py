"""What the figures of a report mean, in a sentence or two each: the end of its page."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.report.formats import DASH

__all__ = ["definitions"]

ALIGNMENT = {
    "none": "Predictions are scored as they are",
    "median": "Each prediction is scaled by the ratio of medians",
    "least_squares": "Each prediction is fitted to its target in depth (scale and shift)",
    "least_squares_disparity": "Each prediction is fitted to its target in disparity (scale and shift)",
}


def definitions(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of what this report shows."""
    score = ((report.get("run") or {}).get("config") or {}).get("score") or {}
    return [
        *(_semantic(score) if report.get("semantic") else ()),
        *(_panoptic() if report.get("panoptic") else ()),
        *(_detection() if report.get("detection") else ()),
        *(_depth(score.get("depth") or {}) if report.get("depth") else ()),
        *_common(report),
    ]


def _semantic(score: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    unknown = " Target ids outside the label space are void too." if score.get("unknown_is_void") else ""
    yield (
        "mIoU",
        "IoU = both / (target + prediction - both), in pixels, summed over all images before they are divided. mIoU "
        "is the mean over the classes that occur in the target or the prediction, so a class that is only predicted "
        "scores 0; mIoU (present) is the mean over the classes in the target.",
    )
    yield (
        "Void",
        "Pixels whose target is void are left out. What is predicted as void or as no known class counts as wrong."
        + unknown,
    )
    yield (
        "Boundary",
        "The same over the pixels within 2 % of the image's diagonal of a mask's border (Cheng et al. 2021).",
    )


def _panoptic() -> Iterator[tuple[str, str]]:
    yield (
        "PQ",
        "PQ = sum of IoU of the matches / (TP + FP/2 + FN/2), as panopticapi has it. A match is of one category and "
        "has an IoU above 0.5; the union leaves out what lies in void. The mean is over the categories with evidence.",
    )
    yield (
        "Crowd and void",
        "A crowd is neither found nor missed. A wrong prediction of which more than half lies in void or in a crowd of "
        "its category is left out. Boundary PQ matches by the smaller of mask IoU and boundary IoU.",
    )


def _detection() -> Iterator[tuple[str, str]]:
    yield (
        "AP",
        "As COCOeval has it: precision at 101 recall points, the mean over IoU 0.50 to 0.95 in steps of 0.05 and over "
        "the classes with targets, with at most 100 predictions per image and class.",
    )
    yield (
        "Crowd",
        "Predictions in a crowd count neither as right nor as wrong. Small, medium and large are targets of up to 32², "
        "up to 96² and more pixels.",
    )


def _depth(depth: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    low, high = depth.get("min_depth", 0.001), depth.get("max_depth")
    crop = depth.get("crop", "none")
    alignment = ALIGNMENT.get(str(depth.get("alignment", "none")), str(depth.get("alignment")))
    yield (
        "Depth",
        f"{alignment}; {'the whole image' if crop == 'none' else f'the crop {crop}'} is scored. Targets count from "
        f"{low} m{f' to {high} m' if high else ' on'}, predictions are clamped to that; where there is none, the "
        "nearest depth counts.",
    )
    yield (
        "Means",
        "Each figure is computed per image and averaged over images. g is the target, p the prediction: SqRel is the "
        "mean of (g - p)² / g, SILog is 100 sqrt(var(ln p - ln g)), δ is the share of pixels with max(g/p, p/g) below "
        "the threshold.",
    )


def _common(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    bootstrap = report.get("bootstrap") or {}
    if report.get("intervals"):
        fewest = min((bootstrap.get("fewer") or {}).values(), default=None)
        fewer = f" ({fewest} for detection, of which there are many records)" if fewest else ""
        yield (
            "Intervals",
            f"{100 * float(bootstrap.get('level', 0.95)):g} % of {bootstrap.get('replicates', 'the')} bootstrap "
            f"replicates{fewer}, which draw images anew: what other images of the same kind would give.",
        )
    yield "No evidence", f"{DASH} means that there was nothing to compute a figure from. It is never counted as 0."
