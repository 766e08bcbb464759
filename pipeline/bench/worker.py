"""What every peer does with an image, by the same functions as maskmill: so that what differs is how images get there.

A peer's row has the table's columns of a prediction, and `key` for whose it is.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import LabelConfig
from pipeline.errors import RowError
from pipeline.images import decode_image
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.spec import Frame, Prediction, Preprocess
from pipeline.preflight.memory import core_count
from pipeline.schema import DEPTH, QUALITY, SEGMENTS, SEMANTIC
from pipeline.stages.encode import encode
from pipeline.stages.predict import Predict, choose_device
from pipeline.stages.prepare import Prepared, prepare

__all__ = ["PEER_ROWS", "READY", "ROWS", "Task", "Worker", "one_model", "write_rows"]

PEER_ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("semantic", SEMANTIC),
        ("segments", SEGMENTS),
        ("depth", DEPTH),
        ("quality", QUALITY),
    ]
)
# Below a peer's folder: a file that is written when the first batch is at the model, and where its rows go.
READY, ROWS = "ready", "rows"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What each peer is given. config: with one model, numbers for batch_pixels and torch_threads, a local output.

    preprocess: of the model, so that who only decodes need not load it. batch_images: for those who count rows.
    """

    config: LabelConfig
    preprocess: Preprocess
    batch_images: int

    def to_json(self) -> str:
        return json.dumps(
            {
                "config": self.config.model_dump(mode="json"),
                "preprocess": asdict(self.preprocess),
                "batch_images": self.batch_images,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Task":
        tree: Mapping[str, Any] = json.loads(text)
        preprocess: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in tree["preprocess"].items()
        }
        return cls(
            config=LabelConfig.model_validate(tree["config"]),
            preprocess=Preprocess(**preprocess),
            batch_images=tree["batch_images"],
        )


def one_model(config: LabelConfig) -> LoadedModel:
    """The model of a benchmark's config. Raises what `load_model` raises."""
    return load_model(config.models[0], seed=config.seed, tile_pixels=config.resources.tile_pixels)


class Worker:
    """The model on its device, and what comes before and after it."""

    def __init__(self, config: LabelConfig, model: LoadedModel | None = None) -> None:
        self.config = config
        threads = config.resources.torch_threads
        torch.set_num_threads(threads if isinstance(threads, int) else core_count())
        self.model = model or one_model(config)
        pixels = config.resources.batch_pixels
        if not isinstance(pixels, int):
            raise TypeError(f"expected resources.batch_pixels to be a number, got {pixels!r}")
        self._predict = Predict(
            self.model, device=choose_device(), batch_pixels=pixels, tile_pixels=config.resources.tile_pixels
        )
        self._ready = Path(config.output.uri) / READY

    def begin(self) -> None:
        """The first batch is at the model: from here on images count. What loads and starts before is start-up."""
        if not self._ready.exists():
            self._ready.parent.mkdir(parents=True, exist_ok=True)
            self._ready.write_text(repr(time.time()))

    def prepare(self, data: bytes) -> Prepared:
        """Decode and resize one image."""
        image_HWC = decode_image(data, max_pixels=self.config.source.max_pixels)
        return prepare(image_HWC, self.model.preprocess)

    def prepared(self, image_CHW: npt.NDArray[np.uint8], height: int, width: int) -> Prepared:
        """What `prepare` gives, of an image that was resized elsewhere. height, width: as decoded."""
        size = (image_CHW.shape[1], image_CHW.shape[2])
        tensor = torch.from_numpy(np.require(image_CHW, requirements=["C", "W"]))
        return Prepared(tensor, Frame(height, width, *size), self.model.preprocess.padded(*size))

    def label(self, keys: Sequence[str], images: Sequence[Prepared]) -> list[dict[str, Any]]:
        """A batch of any sizes as rows of PEER_ROWS; those of one shape go through the model together."""
        self.begin()
        shapes: dict[tuple[int, int], list[int]] = {}
        for at, image in enumerate(images):
            shapes.setdefault(image.padded, []).append(at)
        found: dict[int, Prediction | RowError] = {}
        for places in shapes.values():
            found |= dict(zip(places, self._predict([images[at] for at in places]), strict=True))
        return [self._row(keys[at], images[at].frame, found[at]) for at in range(len(images))]

    def _row(self, key: str, frame: Frame, prediction: Prediction | RowError) -> dict[str, Any]:
        if isinstance(prediction, RowError):
            raise prediction
        columns = encode(prediction, self.config.output.format, width=frame.width, height=frame.height)
        return {"key": key, "width": frame.width, "height": frame.height, **columns}


def write_rows(config: LabelConfig, number: int, rows: Sequence[dict[str, Any]]) -> None:
    """One Parquet file of a peer that writes them itself."""
    folder = Path(config.output.uri) / ROWS
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows), schema=PEER_ROWS)
    pq.write_table(table, folder / f"part-{number:05d}.parquet", compression="zstd", compression_level=1)
