"""Run one model on batches of prepared images: budget, out-of-memory retries, tiles, and errors by row."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import ConfigError, ImageTooLargeError, PredictError, RowError, RunError
from pipeline.models.load import LoadedModel
from pipeline.models.postprocess import FROM_DENSE, dense_output, semantic_from_index, semantic_from_logits
from pipeline.models.spec import Frame, Prediction, Prompts, Quality
from pipeline.stages.augmented import augmented
from pipeline.stages.prepare import Prepared, prepare, resized
from pipeline.stages.refine import refine
from pipeline.stages.tiling import TilePlan, blend_bands, fit_tile, plan_tiles, shrunk_size

__all__ = ["Predict", "choose_device", "default_batch_pixels"]

MIN_TILE_PIXELS = 65_536
CPU_BATCH_PIXELS = 1_000_000
CUDA_PIXELS_PER_GIB = 500_000
# For models that only look where they are told to.
SOMEWHERE = Prompts(boxes=((8.0, 8.0, 56.0, 56.0),))


def choose_device() -> torch.device:
    """The accelerator that Ray gave this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_batch_pixels(device: torch.device) -> int:
    """A start for the budget; running out of memory halves it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory / 2**30 * CUDA_PIXELS_PER_GIB)
    return CPU_BATCH_PIXELS


class Predict:
    """One model on one device. Not thread-safe: one thread calls it."""

    def __init__(self, model: LoadedModel, *, device: torch.device, batch_pixels: int, tile_pixels: int) -> None:
        self.model = model
        self.device = device
        self.batch_pixels = batch_pixels
        self.tile_pixels = tile_pixels
        self._memory_format = torch.channels_last if model.channels_last else torch.contiguous_format
        self._module = model.module.to(device, memory_format=self._memory_format)  # type: ignore[call-overload]
        if model.compile:
            self._module = torch.compile(self._module)
        # Pixels of the largest view of an image, in its own; windows keep views small.
        views = model.tta is not None and model.tta.window is None
        self._largest_view = max(1.0, *model.tta.scales) ** 2 if model.tta is not None and views else 1.0
        self._mean_C11 = torch.tensor(model.preprocess.mean, device=device).view(3, 1, 1) * 255
        self._std_C11 = torch.tensor(model.preprocess.std, device=device).view(3, 1, 1) * 255

    def check(self) -> None:
        """One forward pass on a gray 64x64 image. Raises ConfigError where the output is not what the task needs."""
        try:
            image_HWC = np.full((64, 64, 3), 127, np.uint8)
            self._forward([prepare(image_HWC, self.model.preprocess, SOMEWHERE)])
        except ConfigError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"model {self.model.label!r} fails on a 64x64 image: {type(error).__name__}: {text}"
            ) from error

    def __call__(self, batch: Sequence[Prepared]) -> list[Prediction | RowError]:
        """Predict a batch of one padded shape: a Prediction or the row's error for each image, in order."""
        try:
            if len(batch) == 1 and self.model.spec.tiled and self._view_pixels(batch[0]) > self.tile_pixels:
                return [self._tiled(batch[0])]
            return [_checked(prediction) for prediction in self._forward(batch)]
        except RunError:
            raise
        except Exception as error:  # noqa: BLE001  (a model may raise anything)
            if not _is_out_of_memory(error):
                if len(batch) == 1:
                    text = " ".join(str(error).split())[:500]
                    return [error if isinstance(error, RowError) else PredictError(f"{type(error).__name__}: {text}")]
                return [result for item in batch for result in self([item])]
        # Outside of the except block: the traceback would keep the failed batch's tensors alive.
        return self._with_less_memory(batch)

    def _with_less_memory(self, batch: Sequence[Prepared]) -> list[Prediction | RowError]:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) > 1:
            # Not half of the budget: batches that were filled before it shrank would each shrink it again.
            self.batch_pixels = max(1, min(self.batch_pixels, sum(map(_pixels, batch)) // 2))
            middle = len(batch) // 2
            return self(batch[:middle]) + self(batch[middle:])
        pixels = min(self._view_pixels(batch[0]), self.tile_pixels)
        if not self.model.spec.tiled or pixels <= MIN_TILE_PIXELS:
            size = "x".join(map(str, reversed(batch[0].padded)))
            return [ImageTooLargeError(f"out of memory on {self.device} for one input of {size} pixels")]
        self.tile_pixels = max(MIN_TILE_PIXELS, pixels // 2)
        return self(batch)

    def _view_pixels(self, item: Prepared) -> int:
        return int(_pixels(item) * self._largest_view)

    def _forward(self, batch: Sequence[Prepared]) -> list[Prediction]:
        with torch.inference_mode():
            if self.model.refine or self.model.tta is not None:
                return [
                    self._prediction(values_KHW, item)
                    for values_KHW, item in zip(self._values(batch), batch, strict=True)
                ]
            output = self._run(batch)
            if self.model.spec.task == "semantic":
                self._check_classes(dense_output(output))
            if self.model.spec.dense:
                output = self._at_input_size(output, batch[0].padded)
            return self.model.postprocess(output, [item.frame for item in batch], self.model.context)

    def _values(self, batch: Sequence[Prepared]) -> list[Tensor]:
        """What the model says of each image, over all views: values_KHW float32 at the prepared size, of a model with
        a postprocess of its own at the decoded size."""
        model = self.model
        run = self._maps if model.spec.dense else self._decoded_depths
        if model.tta is None:
            return run(batch)
        return augmented(
            batch,
            run,
            model.tta,
            preprocess=model.preprocess,
            task=model.spec.task,
            depth_kind=model.context.depth_kind,
            decoded=not model.spec.dense,
        )

    def _maps(self, batch: Sequence[Prepared]) -> list[Tensor]:
        output = self._run(batch)
        if self.model.spec.task == "semantic":
            self._check_classes(dense_output(output))
        return [
            values_KHW[:, : item.frame.prepared_height, : item.frame.prepared_width].float()
            for values_KHW, item in zip(self._at_input_size(output, batch[0].padded), batch, strict=True)
        ]

    def _decoded_depths(self, batch: Sequence[Prepared]) -> list[Tensor]:
        found = self.model.postprocess(self._run(batch), [item.frame for item in batch], self.model.context)
        return [torch.from_numpy(prediction.depth_HW)[None] for prediction in found if prediction.depth_HW is not None]

    def _prediction(self, values_KHW: Tensor, item: Prepared) -> Prediction:
        """Values at the prepared size, refined where the config says so, as a prediction at the decoded size."""
        if not self.model.refine:
            return FROM_DENSE[self.model.spec.task](values_KHW, item.frame, self.model.context)
        logits_KHW, index_HW = self._refined(values_KHW, item)
        if index_HW is None:
            return semantic_from_logits(logits_KHW, item.frame, self.model.context)
        return semantic_from_index(index_HW, logits_KHW, item.frame, self.model.context)

    def _refined(self, logits_KHW: Tensor, item: Prepared) -> tuple[Tensor, Tensor | None]:
        """On the model's device, or where its memory is too small on the CPU. Smaller batches or tiles help no more."""
        height, width = item.image_CHW.shape[1:]
        for device in dict.fromkeys((self.device, torch.device("cpu"))):
            try:
                return refine(logits_KHW.to(device), item.image_CHW, self.model.refine, item.superpixels)
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
        raise ImageTooLargeError(f"out of memory refining an image of {width}x{height} pixels")

    def _check_classes(self, logits_BKHW: Tensor) -> None:
        expected, got = len(self.model.taxonomy.ids), logits_BKHW.shape[1]
        if got != expected:
            raise ConfigError(
                f"model {self.model.label!r} gives {got} classes, taxonomy {self.model.taxonomy.name!r} has {expected}"
            )

    def _at_input_size(self, output: object, padded: tuple[int, int]) -> Tensor:
        """The output as B, K, H, W of the padded input; models that answer at a fraction of it are upsampled."""
        if self.model.spec.task == "depth" and isinstance(output, Tensor) and output.ndim == 3:
            output = output[:, None]
        values_BKHW = dense_output(output)
        if values_BKHW.shape[2:] != padded:
            values_BKHW = functional.interpolate(values_BKHW.float(), size=padded, mode="bilinear")
        return values_BKHW

    def _run(self, batch: Sequence[Prepared]) -> object:
        height, width = batch[0].padded
        pinned = self.device.type == "cuda"
        # Laid out as the model takes it from the beginning: decoders give a pixel's channels side by side, too, and
        # turning them over and back takes as long as all else up to the model. What is padded is set below.
        image_BCHW = torch.empty(
            (len(batch), 3, height, width), dtype=torch.uint8, pin_memory=pinned, memory_format=self._memory_format
        )
        for image_CHW, item in zip(image_BCHW, batch, strict=True):
            image_CHW[:, : item.frame.prepared_height, : item.frame.prepared_width] = item.image_CHW
        with torch.inference_mode():
            values = self._normalised(image_BCHW.to(self.device, non_blocking=True).float())
            for value_CHW, item in zip(values, batch, strict=True):
                value_CHW[:, item.frame.prepared_height :] = 0
                value_CHW[:, :, item.frame.prepared_width :] = 0
            values = values.contiguous(memory_format=self._memory_format)
            if pinned:  # of the whole process, and models of one worker may differ
                torch.set_float32_matmul_precision("high" if self.model.precision == "tf32" else "highest")
            enabled = self.model.autocast is not None
            with torch.autocast(self.device.type, dtype=self.model.autocast, enabled=enabled):
                return self.model.spec.forward(self._module, values, [item.frame for item in batch])

    def _normalised(self, values_BCHW: Tensor) -> Tensor:
        """In place."""
        if self._memory_format != torch.channels_last:
            return values_BCHW.sub_(self._mean_C11).div_(self._std_C11)
        batch, _, height, width = values_BCHW.shape
        # Whole rows: three channels side by side are too short a run for the CPU's vectors (7 times as slow).
        rows_BHX = values_BCHW.permute(0, 2, 3, 1).view(batch, height, 3 * width)
        rows_BHX.sub_(self._mean_C11.flatten().repeat(width)).div_(self._std_C11.flatten().repeat(width))
        return values_BCHW

    def _tiled(self, item: Prepared) -> Prediction | RowError:
        """Blend tiles at the prepared size; labels reach the decoded size by the nearest pixel, depth bilinearly or as
        the model's own postprocess has it.

        Views are views of a tile. Refining works on the blended whole, whose logits are then in the CPU's memory at
        once (4 bytes for each class and pixel).
        """
        frame, task = item.frame, self.model.spec.task
        height, width = frame.prepared_height, frame.prepared_width
        multiple = self.model.preprocess.pad_multiple
        tile_pixels = int(self.tile_pixels / self._largest_view)
        plan = plan_tiles(height, width, tile_pixels=tile_pixels, multiple=multiple)
        padded = self.model.preprocess.padded(plan.height, plan.width)

        def tile(row: int, column: int) -> Tensor:
            cut_CHW = item.image_CHW[:, row : row + plan.height, column : column + plan.width]
            part = Prepared(cut_CHW, Frame(plan.height, plan.width, plan.height, plan.width), padded)
            return self._values([part])[0]

        with torch.inference_mode():
            if not self.model.spec.dense:
                return _checked(self._fitted(item, plan, tile, tile_pixels))
            if self.model.refine:
                logits_KHW = torch.cat([band_KhW.cpu() for band_KhW in blend_bands(plan, width, tile)], 1)
                return _checked(self._prediction(logits_KHW, item))
            bands = list(self._band_predictions(blend_bands(plan, width, tile), width))
        if task == "depth":
            whole = np.concatenate([band.depth_HW for band in bands if band.depth_HW is not None])
            result = torch.from_numpy(whole)[None]
            return _checked(FROM_DENSE["depth"](result, frame, self.model.context))
        label_HW = np.concatenate([band.label_HW for band in bands if band.label_HW is not None])
        if label_HW.shape != (frame.height, frame.width):
            rows = np.minimum((np.arange(frame.height) + 0.5) * height / frame.height, height - 1).astype(np.int64)
            columns = np.minimum((np.arange(frame.width) + 0.5) * width / frame.width, width - 1).astype(np.int64)
            label_HW = label_HW[np.ix_(rows, columns)]
        return _checked(Prediction(label_HW=label_HW, quality=_mean_quality(bands)))

    def _fitted(
        self, item: Prepared, plan: TilePlan, tile: Callable[[int, int], Tensor], tile_pixels: int
    ) -> Prediction:
        """Tiles of depth with the scale and shift of the whole image, which is seen small first."""
        frame, preprocess = item.frame, self.model.preprocess
        size = frame.prepared_height, frame.prepared_width
        small = shrunk_size(*size, tile_pixels=tile_pixels, multiple=preprocess.pad_multiple)
        image_CHW = resized(item.image_CHW, small, antialias=True)
        (whole_1hw,) = self._values([Prepared(image_CHW, Frame(*small, *small), preprocess.padded(*small))])

        def fitted(row: int, column: int) -> Tensor:
            return fit_tile(tile(row, column), whole_1hw, (row, column), size)

        depth_1HW = torch.cat([*blend_bands(plan, size[1], fitted)], 1)
        (prediction,) = self.model.postprocess(depth_1HW, [frame], self.model.context)
        return prediction

    def _band_predictions(self, bands: Iterator[Tensor], width: int) -> Iterator[Prediction]:
        for values_KhW in bands:
            rows = values_KhW.shape[1]
            yield FROM_DENSE[self.model.spec.task](values_KhW, Frame(rows, width, rows, width), self.model.context)


def _pixels(item: Prepared) -> int:
    return item.padded[0] * item.padded[1]


def _checked(prediction: Prediction) -> Prediction:
    if prediction.quality is not None and not np.isfinite(prediction.quality.mean_max_probability):
        raise PredictError("the model's logits are not finite")
    if prediction.depth_HW is not None and not np.isfinite(prediction.depth_HW).any():
        raise PredictError("the model's depth is finite at no pixel")
    return prediction


def _mean_quality(bands: Sequence[Prediction]) -> Quality | None:
    parts = [(band.quality, len(band.label_HW)) for band in bands if band.quality and band.label_HW is not None]
    rows = sum(count for _, count in parts)
    if not rows:
        return None
    return Quality(
        *(
            sum(getattr(quality, name) * count for quality, count in parts) / rows
            for name in ("mean_max_probability", "mean_entropy", "low_confidence_share")
        )
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
    )
