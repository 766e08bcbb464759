"""All that is measured where a worker would run: in a process of its own, or in a task on the cluster."""

import gc
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import LabelConfig
from pipeline.config_train import TrainConfig
from pipeline.errors import ConfigError, MaskmillError, RowError, RunError
from pipeline.models.licences import licence_warning
from pipeline.models.load import LoadedModel, load_model
from pipeline.preflight.finding import Findings
from pipeline.preflight.memory import core_count
from pipeline.preflight.probe import probe_output
from pipeline.preflight.rehearsal import Rehearsal, first_positions, rehearse
from pipeline.preflight.sampling import Corpus, Part, choose
from pipeline.preflight.survey import SourceFindings, Survey, source_findings, survey
from pipeline.preflight.trial import Trial, best_budget, trial
from pipeline.scoring import plan_scorers
from pipeline.sources.base import Unit
from pipeline.sources.registry import open_source
from pipeline.stages.predict import choose_device, default_batch_pixels
from pipeline.training.setup import start_model

__all__ = ["Measured", "Options", "measure"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """units: how many are looked at. images: of each at most. trial_s, rehearsal_s: how long either may take, about.

    probe: whether the output is tried from there too.
    """

    units: int = 8
    images: int = 64
    seed: int = 0
    trial_s: float = 60.0
    rehearsal_s: float = 30.0
    probe: bool = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a worker found. device, cores: what it had. own_pixels: the config's batch budget on that device.

    best_pixels: the budget that is proposed, with which the rehearsal ran; None without a trial.
    """

    findings: Findings
    device: str
    accelerator: bool
    cores: int
    source: SourceFindings | None = None
    models: tuple[dict[str, Any], ...] = ()
    own_pixels: int | None = None
    best_pixels: int | None = None
    trials: tuple[Trial, ...] = ()
    rehearsal: Rehearsal | None = None


def measure(config: LabelConfig | TrainConfig, units: Sequence[Unit], corpus: Corpus, options: Options) -> Measured:
    """Load the models, read and decode the sample, try batch budgets, label a few images. What fails is a problem."""
    found = Findings()
    device = choose_device()
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{core_count()} CPU cores"
    base: dict[str, Any] = {
        "findings": found, "device": here, "accelerator": device.type != "cpu", "cores": core_count(),
    }  # fmt: skip
    if options.probe:
        found.add(probe_output(config.output.uri, config.output.storage, delta=isinstance(config, LabelConfig)))
    models = _load(config, found)
    wanted = len(config.models) if isinstance(config, LabelConfig) else 1
    descriptions = tuple(model.describe() for model in models)
    base["models"] = descriptions

    source = open_source(config.source)
    labels = isinstance(config, LabelConfig)
    try:
        parts = [choose(source, unit, options.images, options.seed) for unit in units]
        looked = survey(
            source,
            config.source,
            parts,
            [model.preprocess for model in models] if labels else [],
            [model.spec.prompts for model in models] if labels else [],
            [model.refine for model in models] if labels else [],
        )
    except RunError as error:
        found.problem("source", str(error), "make the source readable from where the workers run")
        return Measured(**base)
    base["source"] = source_findings(corpus, looked)
    if not isinstance(config, LabelConfig) or len(models) < wanted or not looked.kept:
        return Measured(**base)

    setting = config.resources.torch_threads
    torch.set_num_threads(setting if isinstance(setting, int) else core_count())
    given = config.resources.batch_pixels
    own = given if isinstance(given, int) else default_batch_pixels(device)
    base["own_pixels"] = own
    trials = _trials(config, models, looked, device, own, options, found)
    if len(trials) < wanted:
        return Measured(**base)
    pixels = best_budget(trials)
    # A single image may look best where there was time for nothing else.
    short = [item.label for item in trials if item.ended == "time" and item.points[-1].budget_pixels < own]
    if short:
        pixels = None
        found.notes.append(
            f"{', '.join(short)}: time was up before the config's batch budget was tried, so none is proposed; "
            "--seconds gives more"
        )
    base |= {"trials": trials, "best_pixels": pixels}
    each_s = sum(min(point.seconds_per_image for point in item.points) for item in trials)
    del models
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    base["rehearsal"] = _rehearsal(config, parts, looked, [dict(item) for item in descriptions], pixels or own, each_s,
                                   options, found)  # fmt: skip
    return Measured(**base)


def _load(config: LabelConfig | TrainConfig, found: Findings) -> list[LoadedModel]:
    if isinstance(config, TrainConfig):
        try:
            loaded = [start_model(config)[0]]
        except (RunError, MemoryError) as error:
            found.problem("model", str(error), _model_remedy(error))
            return []
        places = ["model"]
    else:
        loaded, places = [], []
        for index, one in enumerate(config.models):
            try:
                loaded.append(load_model(one, seed=config.seed, tile_pixels=config.resources.tile_pixels))
                places.append(f"models.{index}")
            except (RunError, MemoryError) as error:
                found.problem(f"models.{index}", str(error) or type(error).__name__, _model_remedy(error))
    for place, model in zip(places, loaded, strict=True):
        about = model.describe()
        if model.weights == "none" and about["parameters"] and isinstance(config, LabelConfig):
            found.notes.append(f"{place}.weights is none: {model.label} labels with random weights")
        if not about["commercial"]:
            found.notes.append(licence_warning(model.label, about["license"]))
    return loaded


def _model_remedy(error: BaseException) -> str:
    if isinstance(error, ConfigError):
        return "correct the model's section; `maskmill models` lists names and weights"
    return "make the weights readable from where the workers run, or give workers with more memory"


def _trials(
    config: LabelConfig,
    models: Sequence[LoadedModel],
    looked: Survey,
    device: torch.device,
    own: int,
    options: Options,
    found: Findings,
) -> tuple[Trial, ...]:
    common = [
        Counter(items[index].padded for items in looked.kept).most_common(1)[0][0] for index in range(len(models))
    ]
    result = []
    for index, model in enumerate(models):
        try:
            done = trial(
                model,
                [items[index] for items in looked.kept],
                device=device,
                own_pixels=own,
                base_pixels=max(height * width for height, width in common),
                tile_pixels=config.resources.tile_pixels,
                most_images=config.output.rows_per_file,
                seconds=options.trial_s / len(models),
            )
        except MaskmillError as error:
            remedy = "try the model on one image, or give its workers more memory"
            found.problem(
                f"models.{index}", str(error), remedy if isinstance(error, RowError) else _model_remedy(error)
            )
            continue
        result.append(done)
        model.module.to("cpu")
    return tuple(result)


def _rehearsal(
    config: LabelConfig,
    parts: Sequence[Part],
    looked: Survey,
    models: list[dict[str, Any]],
    pixels: int,
    each_s: float,
    options: Options,
    found: Findings,
) -> Rehearsal | None:
    try:
        asked = "score" in config.model_fields_set
        scorers, notes = plan_scorers(config.score, config.source, models, asked=asked)
        found.notes += notes
    except RunError as error:
        found.problem("score", str(error), "correct score, or set score=null to label without scores")
        scorers = [None] * len(models)
    decode_s = (looked.decode_s + looked.prepare_s) / max(1, looked.timed)
    images = max(1, math.floor(options.rehearsal_s / max(each_s + decode_s, 1e-6)))
    try:
        return rehearse(config, first_positions(parts, images), scorers, pixels)
    except RunError as error:
        found.problem("models", str(error), "correct what it names")
        return None
