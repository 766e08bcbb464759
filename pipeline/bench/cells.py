"""What is measured: a corpus and a model at a time, by name or as CORPUS:MODEL."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.bench.corpora import CorpusKind, corpus_kinds
from pipeline.errors import ConfigError
from pipeline.models.registry import find_model

__all__ = ["ARMS", "CELLS", "FREE_ARMS", "QUICK_CELLS", "ArmSpec", "CellSpec", "find_cell"]


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """corpus: its kind. model: a section of a config's models. images: so many of them make it a few seconds of work on
    two cores."""

    name: str
    corpus: CorpusKind
    model: Mapping[str, Any]
    images: int


@dataclass(frozen=True, kw_only=True)
class ArmSpec:
    """title: what it is, for the table. module: what must be installed for it. leaves_out: what it does not do."""

    title: str
    module: str = ""
    leaves_out: str = ""
    rows: bool = field(default=True)


# In the order of their turns.
ARMS: Mapping[str, ArmSpec] = {
    "limit": ArmSpec(title="forward passes on ready tensors", leaves_out="all but the forward pass", rows=False),
    "decode": ArmSpec(title="decoding alone, on all cores", leaves_out="all but decoding and resizing", rows=False),
    "maskmill": ArmSpec(title="maskmill label"),
    "loop": ArmSpec(title="PyTorch DataLoader loop", leaves_out="commits, resuming, failed rows"),
    "ray_data": ArmSpec(title="Ray Data, as in its guide", leaves_out="commits, resuming, failed rows"),
    "daft": ArmSpec(
        title="Daft with a class UDF", module="daft", leaves_out="commits, resuming, failed rows, EXIF orientation"
    ),
    "transformers": ArmSpec(
        title="transformers pipeline",
        module="transformers",
        leaves_out="commits, resuming, failed rows, EXIF orientation, quality; sizes of its own image processor",
    ),
}
# Without --peers.
FREE_ARMS = ("limit", "decode", "maskmill")

UNET = {"name": "unet_small", "weights": "bundled:unet_small_scenes"}
CELLS: Mapping[str, CellSpec] = {
    cell.name: cell
    for cell in (
        CellSpec(name="light", corpus="tar", model=UNET, images=96),
        CellSpec(name="medium", corpus="tar", model={"name": "deeplabv3_mobilenet_v3_large"}, images=96),
        CellSpec(name="heavy", corpus="tar", model={"name": "fcn_resnet50"}, images=12),
        # Bounded, as 4K images are for most models: decoding them is most of the work.
        CellSpec(name="mixed", corpus="mixed", model={**UNET, "options": {"max_size": 640}}, images=96),
        CellSpec(name="parquet", corpus="parquet", model={"name": "null_model"}, images=384),
        CellSpec(name="s3", corpus="s3", model={"name": "null_model"}, images=384),
        # Without trained weights no box would pass the usual thresholds, and all of them would without a bound.
        CellSpec(
            name="instance",
            corpus="tar",
            model={
                "name": "maskrcnn_resnet50_fpn_v2",
                "options": {
                    "resize": 320,
                    "score_threshold": 0.0,
                    "box_score_thresh": 0.0,
                    "rpn_post_nms_top_n_test": 50,
                    "box_detections_per_img": 10,
                },
            },
            images=12,
        ),
        CellSpec(name="depth", corpus="tar", model={"name": "unet_small_depth"}, images=96),
        CellSpec(
            name="transformers",
            corpus="tar",
            model={"name": "depth_anything_v2", "options": {"size": "small", "resize": 252}},
            images=32,
        ),
    )
}
QUICK_CELLS = ("light",)


def find_cell(text: str) -> CellSpec:
    """A cell by name, or of a corpus and a model of the registry. Raises ConfigError, UnknownModelError."""
    if text in CELLS:
        return CELLS[text]
    corpus, separator, model = text.partition(":")
    if separator and corpus in corpus_kinds():
        find_model(model)
        return CellSpec(name=text, corpus=corpus, model={"name": model}, images=96)  # type: ignore[arg-type]
    close = difflib.get_close_matches(text, CELLS, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(CELLS)}"
    raise ConfigError(f"unknown cell {text!r}; {hint}, or CORPUS:MODEL with a corpus of {', '.join(corpus_kinds())}")
