"""Test-time augmentation: what a dense model says of several views of an image, averaged."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import TtaConfig, WindowConfig
from pipeline.models.spec import Frame, Preprocess, Task
from pipeline.stages.prepare import Prepared, resized
from pipeline.stages.tiling import blend_bands, fit_affine, plan_windows

__all__ = ["augmented"]

Run = Callable[[Sequence[Prepared]], list[Tensor]]


def augmented(
    batch: Sequence[Prepared],
    run: Run,
    tta: TtaConfig,
    *,
    preprocess: Preprocess,
    task: Task,
    depth_kind: str,
    decoded: bool = False,
) -> list[Tensor]:
    """The mean over the views of each image: values_KHW float32 at its prepared size, on the device of `run`'s.

    run: images of one padded shape -> values_KHW of each at its prepared size. decoded: at its decoded size, which then
    is the mean's, too; without windows.

    Semantic: the log of the mean probability (a softmax of each view, as DeepLab averages them), which is a logit like
    any other. Depth: the mean. Scaling shows the same view with other pixels, so depths in metres are averaged as they
    are. Relative depths have a scale and shift of their own in each view: they are fitted by least squares to those of
    the view whose scale is nearest to 1 first.
    """
    totals: list[Tensor] = []
    reference: list[Tensor] = []
    views = [
        (scale, mirrored) for scale in sorted(tta.scales, key=_distance) for mirrored in (False, True)[: 1 + tta.flip]
    ]
    for scale, mirrored in views:
        values = [
            _as_the_image(values_KHW, item.frame, mirrored, decoded)
            for values_KHW, item in zip(
                _outputs([_view(item, scale, mirrored, preprocess) for item in batch], run, tta.window, preprocess),
                batch,
                strict=True,
            )
        ]
        if len(views) == 1:
            return values
        if task == "semantic":
            values = [values_KHW.softmax(0) for values_KHW in values]
        elif depth_kind != "metric_m":
            reference = reference or values
            fits = [fit_affine(*pair) for pair in zip(values, reference, strict=True)]
            values = [(one - mean) * scale + target for one, (mean, scale, target) in zip(values, fits, strict=True)]
        totals = [total + more for total, more in zip(totals, values, strict=True)] if totals else values
    means = [total / len(views) for total in totals]
    if task == "semantic":
        # A class that no view allows stays finite: resizing multiplies it by 0.
        return [mean.clamp_(min=torch.finfo(torch.float32).tiny).log_() for mean in means]
    return means


def _distance(scale: float) -> tuple[float, float]:
    return abs(math.log(scale)), scale


def _view(item: Prepared, scale: float, mirrored: bool, preprocess: Preprocess) -> Prepared:
    frame = item.frame
    size = tuple(max(1, round(side * scale)) for side in (frame.prepared_height, frame.prepared_width))
    image_CHW = item.image_CHW
    if size != image_CHW.shape[1:]:
        image_CHW = resized(image_CHW, size, antialias=preprocess.antialias)
    return replace(
        item,
        image_CHW=image_CHW.flip(-1) if mirrored else image_CHW,
        frame=replace(frame, prepared_height=size[0], prepared_width=size[1]),
        padded=preprocess.padded(*size),
        superpixels=(),
    )


def _outputs(views: Sequence[Prepared], run: Run, window: WindowConfig | None, preprocess: Preprocess) -> list[Tensor]:
    """The output of each view at its own size. Those of one shape go together, so that an image's padding never depends
    on its neighbours."""

    def shape(index: int) -> tuple[int, int]:
        return (
            views[index].padded
            if window is None
            else (views[index].image_CHW.shape[1], views[index].image_CHW.shape[2])
        )

    outputs: dict[int, Tensor] = {}
    for _, group in groupby(sorted(range(len(views)), key=shape), shape):
        indices = list(group)
        together = [views[index] for index in indices]
        values = run(together) if window is None else _windowed(together, run, window, preprocess)
        outputs.update(zip(indices, values, strict=True))
    return [outputs[index] for index in range(len(views))]


def _windowed(views: Sequence[Prepared], run: Run, window: WindowConfig, preprocess: Preprocess) -> list[Tensor]:
    """Views of one size in windows, blended: values_KHW at that size."""
    height, width = views[0].image_CHW.shape[1:]
    plan = plan_windows(height, width, size=window.size, overlap=window.overlap)
    padded = preprocess.padded(plan.height, plan.width)
    frame = Frame(plan.height, plan.width, plan.height, plan.width)

    def predict(row: int, column: int) -> Tensor:
        parts = [
            replace(
                view,
                image_CHW=view.image_CHW[:, row : row + plan.height, column : column + plan.width],
                frame=frame,
                padded=padded,
            )
            for view in views
        ]
        # Images lie behind each other in the channels, which is where blending looks at nothing.
        return torch.cat(run(parts))

    bands: Iterator[Tensor] = blend_bands(plan, width, predict)
    return list(torch.cat(list(bands), 1).chunk(len(views)))


def _as_the_image(values_KHW: Tensor, frame: Frame, mirrored: bool, decoded: bool) -> Tensor:
    """A view's values where the image's pixels are."""
    size = (frame.height, frame.width) if decoded else (frame.prepared_height, frame.prepared_width)
    if mirrored:
        values_KHW = values_KHW.flip(-1)
    if values_KHW.shape[1:] != size:
        values_KHW = functional.interpolate(values_KHW[None], size=size, mode="bilinear", align_corners=False)[0]
    return values_KHW
