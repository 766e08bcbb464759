"""What a run leaves on storage: checkpoints to go on from, its history and pictures, and in the end the model."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pipeline.config_train import TrainConfig
from pipeline.configfile import redacted
from pipeline.errors import ConfigError, SourceChangedError, StorageError
from pipeline.models.load import LoadedModel
from pipeline.storage import join
from pipeline.training.checkpoint import Checkpoint, CheckpointStore
from pipeline.training.history import Row, best_epoch, curve_png, json_lines, parquet
from pipeline.training.setup import model_spec
from pipeline.training.sheet import Shown, draw_sheet
from pipeline.training.tensorboard import EVENT_FILE, event_file
from pipeline.training.validate import HEADLINES, Scores, lower_is_better

__all__ = ["Record"]


class Record:
    """One run's output; rank 0 writes it. history: a row per epoch. run_id: of the run that began it.

    fingerprint: of the images that are learned from. Raises ConfigError for a `checkpoint.best` that the validation
    does not have.
    """

    def __init__(self, config: TrainConfig, model: LoadedModel, *, fingerprint: str, run_id: str) -> None:
        self.config = config
        self.model = model
        self.run_id = run_id
        self.history: list[Row] = []
        self._fingerprint = fingerprint
        self.headline = config.checkpoint.best or HEADLINES[model.spec.task]
        self._figures = [*Scores().figures(model.spec.task, model.taxonomy)]
        if self.headline not in self._figures:
            raise ConfigError(f"checkpoint.best must be one of {', '.join(self._figures)}, got {self.headline!r}")
        self.store = CheckpointStore(
            config.output.uri,
            config.output.storage,
            keep=config.checkpoint.keep,
            lower_is_better=lower_is_better(self.headline),
            attempts=config.checkpoint.attempts,
        )

    def save(
        self,
        model: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        state: Any,
        progress: Mapping[str, Any],
        figure: float | int | None,
    ) -> Checkpoint:
        """Write a checkpoint. model, tensors, state: as `capture` gives them. progress: as JSON holds it, with `epoch`
        and `done` (steps of the run). figure: the headline, None where it was not validated. Raises StorageError."""
        step = progress["done"]
        # Figures of these weights, or of none: a checkpoint in the middle of an epoch has not been validated.
        last: Row = self.history[-1] if self.history and self.history[-1]["step"] == step else {}
        spec = {
            **model_spec(self.config, self.model),
            "metrics": {name: last[name] for name in self._figures if name in last},
            "run_id": self.run_id,
            "epoch": progress["epoch"],
            "step": step,
            "data": {"source": redacted(self.config)["source"], "fingerprint": self._fingerprint},
        }
        meta = {
            "run_id": self.run_id,
            "order": self._order(),
            "progress": progress,
            "history": self.history,
            "state": state,
        }
        return self.store.save(
            step=step,
            model=model,
            spec=spec,
            state=tensors,
            meta=meta,
            figure=None if figure is None else float(figure),
        )

    def resume(self, meta: Mapping[str, Any]) -> None:
        """Go on with a checkpoint's history. Raises SourceChangedError or ConfigError where images, batches or seed are
        others than the checkpoint's: what of the epoch is left to see could not be told."""
        now, stored = self._order(), meta["order"]
        if stored["fingerprint"] != now["fingerprint"]:
            raise SourceChangedError("the training images are not those of the checkpoint; train into another output")
        for name, value in now.items():
            if stored[name] != value:
                raise ConfigError(
                    f"{name} must be {stored[name]} as in the checkpoint that training goes on from, got {value}; "
                    "train into another output to change it"
                )
        self.history, self.run_id = meta["history"], meta["run_id"]

    def show(self, shown: Sequence[Shown]) -> None:
        """Write what a person watches: the history and the epoch's sheet. Raises StorageError."""
        row, best = self.history[-1], best_epoch(self.history, self.headline, lower_is_better(self.headline))
        self.store.put("metrics.jsonl", json_lines(self.history))
        self.store.put("metrics.parquet", parquet(self.history))
        self.store.put("curve.png", curve_png(self.history, ("loss", self.headline), best=best))
        if self.config.output.tensorboard:
            self.store.put(EVENT_FILE, event_file(self.history))
        if shown:
            figure = row.get(self.headline)
            title = f"epoch {row['epoch']} of {self.config.epochs}: {self.headline}"
            title += " –" if figure is None else f" {figure:.4f}"
            sheet = draw_sheet(shown, self.model.spec.task, self.model.taxonomy, title)
            self.store.put(f"sheets/epoch-{row['epoch']:04d}.png", sheet)
            self.store.put("sheet.png", sheet)

    def publish(self) -> tuple[str, Checkpoint]:
        """Copy the best model to `checkpoint`, the newest where none was validated. Raises StorageError."""
        chosen = self.store.best() or self.store.list()[-1]
        uri = join(self.config.output.uri, "checkpoint")
        self.store.publish(chosen, uri, self.config.output.storage)
        return uri, chosen

    def diverged(self, report: Mapping[str, Any]) -> str:
        """Keep what a step that diverged was made of; the file's path, empty where storage fails."""
        with contextlib.suppress(StorageError):
            name = f"diverged-{report['epoch']:04d}-{report['step']:06d}.json"
            return self.store.put(name, json.dumps(report, indent=1).encode())
        return ""

    def _order(self) -> dict[str, Any]:
        """What the place of every image depends on."""
        config = self.config
        return {
            "fingerprint": self._fingerprint,
            "seed": config.seed,
            "batch_images": config.batch_images,
            "shuffle_images": config.shuffle_images,
        }
