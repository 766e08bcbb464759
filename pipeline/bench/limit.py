"""What labelling cannot be faster than: the forward pass on tensors that are ready, and decoding on all cores."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from pipeline.bench.reading import list_shards, read_shard
from pipeline.bench.worker import Task, one_model
from pipeline.config import LabelConfig
from pipeline.images import decode_image
from pipeline.models.load import LoadedModel
from pipeline.models.spec import Frame
from pipeline.preflight.memory import core_count
from pipeline.stages.batching import PixelBatcher
from pipeline.stages.predict import choose_device
from pipeline.stages.prepare import Prepared, prepare
from pipeline.stages.tiling import plan_tiles

__all__ = ["decode_limit", "model_limit"]

# Of ready tensors. Further images are as those before them.
READY_BYTES = 2_000_000_000
LEAST_S = 5.0


def model_limit(task: Task) -> float:
    """Images per second of bare forward passes over the corpus's own batches, normalised and on the device.

    An image that is tiled counts once for all of its tiles.
    """
    config = task.config
    model = one_model(config)
    device = choose_device()
    layout = torch.channels_last if model.channels_last else torch.contiguous_format
    module = model.module.to(device, memory_format=layout)  # type: ignore[call-overload]
    threads = config.resources.torch_threads
    torch.set_num_threads(threads if isinstance(threads, int) else core_count())
    with torch.inference_mode(), torch.autocast(device.type, model.autocast, enabled=model.autocast is not None):
        batches = [
            (tensor.contiguous(memory_format=layout), frames, images)
            for tensor, frames, images in _ready(config, model, device)
        ]
        shapes = {tensor.shape: (tensor, frames) for tensor, frames, _ in batches}
        for tensor, frames in shapes.values():  # the first pass of a shape sets things up
            model.spec.forward(module, tensor, frames)
        started, done = time.perf_counter(), 0.0
        while time.perf_counter() - started < LEAST_S:
            for tensor, frames, images in batches:
                model.spec.forward(module, tensor, frames)
                done += images
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return done / (time.perf_counter() - started)


def _ready(
    config: LabelConfig, model: LoadedModel, device: torch.device
) -> Iterator[tuple[Tensor, list[Frame], float]]:
    """Batches as they are made when labelling, and how many images each stands for."""
    pixels = config.resources.batch_pixels
    budget = pixels if isinstance(pixels, int) else 1
    batcher = PixelBatcher[Prepared](lambda: budget)
    left = READY_BYTES
    for image in _images(config, model):
        height, width = image.padded
        if model.spec.dense and height * width > config.resources.tile_pixels:
            yield from _tiles(image, config, model, device)
            continue
        left -= 12 * height * width
        batch = batcher.add(image)
        if batch:
            yield _stacked(batch, model, device), [item.frame for item in batch], len(batch)
        if left < 0:
            break
    for batch in batcher.flush():
        yield _stacked(batch, model, device), [item.frame for item in batch], len(batch)


def _images(config: LabelConfig, model: LoadedModel) -> Iterator[Prepared]:
    for shard in list_shards(config):
        for _, data in read_shard(config, shard):
            yield prepare(decode_image(data, max_pixels=config.source.max_pixels), model.preprocess)


def _tiles(
    image: Prepared, config: LabelConfig, model: LoadedModel, device: torch.device
) -> Iterator[tuple[Tensor, list[Frame], float]]:
    frame = image.frame
    plan = plan_tiles(
        frame.prepared_height,
        frame.prepared_width,
        tile_pixels=config.resources.tile_pixels,
        multiple=model.preprocess.pad_multiple,
    )
    places = [(row, column) for row in plan.rows for column in plan.columns]
    size = (plan.height, plan.width)
    for row, column in places:
        cut_CHW = image.image_CHW[:, row : row + plan.height, column : column + plan.width]
        tile = Prepared(cut_CHW, Frame(*size, *size), model.preprocess.padded(*size))
        yield _stacked([tile], model, device), [tile.frame], 1 / len(places)


def _stacked(batch: Sequence[Prepared], model: LoadedModel, device: torch.device) -> Tensor:
    height, width = batch[0].padded
    image_BCHW = torch.zeros((len(batch), 3, height, width))
    mean_C11 = torch.tensor(model.preprocess.mean).view(3, 1, 1) * 255
    std_C11 = torch.tensor(model.preprocess.std).view(3, 1, 1) * 255
    for image_CHW, item in zip(image_BCHW, batch, strict=True):
        rows, columns = item.image_CHW.shape[1:]
        image_CHW[:, :rows, :columns] = (item.image_CHW.float() - mean_C11) / std_C11
    return image_BCHW.to(device)


def decode_limit(task: Task) -> float:
    """Images per second of reading, decoding and resizing alone, on all cores."""
    config = task.config
    torch.set_num_threads(1)
    encoded = [data for shard in list_shards(config) for _, data in read_shard(config, shard)]

    def decode(data: bytes) -> None:
        prepare(decode_image(data, max_pixels=config.source.max_pixels), task.preprocess)

    with ThreadPoolExecutor(core_count()) as pool:
        decode(encoded[0])  # what it imports takes seconds
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < LEAST_S / 2:
            for _ in pool.map(decode, encoded):
                done += 1
        return done / (time.perf_counter() - started)
