"""A transformers pipeline (https://huggingface.co/docs/transformers), for models that are transformers' own.

It resizes by its own image processor and gives no confidence, so its rows lack `quality` and its labels differ.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from pipeline.bench.reading import list_shards, read_shard
from pipeline.bench.worker import Task, Worker, write_rows
from pipeline.errors import ConfigError
from pipeline.models.extras import import_extra
from pipeline.models.load import LoadedModel
from pipeline.models.spec import Prediction
from pipeline.stages.encode import encode
from pipeline.stages.predict import choose_device

__all__ = ["refusal", "run_transformers"]

TASKS = {"depth": "depth-estimation", "semantic": "image-segmentation"}


def refusal(model: LoadedModel) -> str:
    """Why there is no pipeline for a model, empty where there is one. Raises ConfigError without the extra."""
    library = import_extra("transformers", "peers")
    if not isinstance(model.module, library.PreTrainedModel):
        return "the model is not one of transformers'"
    if model.spec.task not in TASKS:
        return f"no pipeline gives what task {model.spec.task} stores"
    return ""


def run_transformers(task: Task) -> None:
    """Label the corpus. Raises ConfigError for a model that there is no pipeline for."""
    library = import_extra("transformers", "peers")
    config = task.config
    worker = Worker(config)
    model = worker.model
    reason = refusal(model)
    if reason:
        raise ConfigError(reason)
    preprocess = model.preprocess
    side = preprocess.resize or 384
    processor = library.DPTImageProcessor(
        do_resize=preprocess.resize is not None,
        size={"height": side, "width": side},
        keep_aspect_ratio=True,
        ensure_multiple_of=preprocess.pad_multiple,
        image_mean=list(preprocess.mean),
        image_std=list(preprocess.std),
    )
    pipe = library.pipeline(
        TASKS[model.spec.task],
        model=model.module,
        image_processor=processor,
        device=choose_device(),
        batch_size=task.batch_images,
    )
    keys: list[str] = []
    rows: list[dict[str, Any]] = []
    written = 0
    for at, found in enumerate(pipe(_images(worker, keys))):
        prediction = _prediction(found, model)
        array_HW = prediction.depth_HW if prediction.depth_HW is not None else prediction.label_HW
        if array_HW is None:
            raise ConfigError("the pipeline gives neither labels nor depth")
        height, width = array_HW.shape
        columns = encode(prediction, config.output.format, width=width, height=height)
        rows.append({"key": keys[at], "width": width, "height": height, **columns})
        if len(rows) >= config.output.rows_per_file:
            write_rows(config, written, rows)
            rows, written = [], written + 1
    if rows:
        write_rows(config, written, rows)


def _images(worker: Worker, keys: list[str]) -> Iterator[Image.Image]:
    for shard in list_shards(worker.config):
        for key, data in read_shard(worker.config, shard):
            worker.begin()
            keys.append(key)
            yield Image.open(io.BytesIO(data)).convert("RGB")


def _prediction(found: Any, model: LoadedModel) -> Prediction:
    if model.spec.task == "depth":
        depth_HW = np.asarray(found["predicted_depth"].float().cpu(), np.float32).squeeze()
        return Prediction(depth_HW=depth_HW, depth_kind=model.context.depth_kind)
    ids = np.asarray(model.taxonomy.ids, model.taxonomy.dtype)
    masks = [np.asarray(item["mask"]) > 0 for item in found]
    label_HW = np.full(masks[0].shape, model.taxonomy.void_id, model.taxonomy.dtype)
    network: Any = model.module
    places = network.config.label2id
    for item, mask_HW in zip(found, masks, strict=True):
        label_HW[mask_HW] = ids[int(places[item["label"]])]
    return Prediction(label_HW=label_HW)
