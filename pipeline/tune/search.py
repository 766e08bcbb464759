"""Which setting wins: the fastest whose labels stay within a tolerance of those in fp32. The same measurements make the
same choice."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.tune.settings import Context, Setting, proposals

__all__ = ["GAIN", "Failed", "Outcome", "Search", "Timed", "Trial", "search"]

# A setting that gains less than this is not worth a change: two runs of the same one differ by as much.
GAIN = 0.03
Verdict = Literal["start", "taken", "refused", "not tried"]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What a setting came to on the sample. seconds_per_image: of the model, with what makes labels of its output.

    setup_s: what the first batches took beyond that. loss: `Agreement.loss` against fp32. figures: what it is made of.
    failed: images that fail here and not in fp32. equal: images whose prediction is the same to the last pixel.
    """

    seconds_per_image: float
    setup_s: float
    images: int
    loss: float
    figures: Mapping[str, float] = field(default_factory=dict)
    failed: int = 0
    equal: int = 0


@dataclass(frozen=True)
class Failed:
    """A setting that does not work here. reason: of its crash."""

    reason: str


Outcome = Timed | Failed


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting's outcome and what became of it. outcome: None where it was not tried. reason: of its refusal."""

    axis: str
    setting: Setting
    outcome: Outcome | None
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Search:
    """All trials in order. start: of the fp32 setting, which the others are compared with. best: what won."""

    trials: tuple[Trial, ...]
    start: Timed
    best: Setting
    best_outcome: Timed
    tolerance: float

    @property
    def speedup(self) -> float:
        return self.start.seconds_per_image / self.best_outcome.seconds_per_image

    def plain(self) -> dict[str, Any]:
        """JSON's values."""
        return {
            "tolerance": self.tolerance,
            "best": {"options": dict(self.best.options), "resources": dict(self.best.resources)},
            "speedup": self.speedup,
            "trials": [_plain(trial) for trial in self.trials],
        }


def search(
    start: Setting,
    context: Context,
    measure: Callable[[Setting], Outcome],
    *,
    axes: Sequence[str],
    tolerance: float,
    budget_of: Callable[[Setting], int | None] = lambda _: None,
    time_left: Callable[[], bool] = lambda: True,
) -> Search | Failed:
    """Go along the axes, each from the best so far; on each, the fastest setting within the tolerance is taken where it
    gains GAIN or more, the first tried of equally fast ones.

    start: the fp32 setting, whose failure is the search's. budget_of: the batch budget that is worth trying with a
    setting. time_left: False ends it, and what is left is listed as not tried.
    """
    first = measure(start)
    if isinstance(first, Failed):
        return first
    trials = [Trial(axis="", setting=start, outcome=first, verdict="start")]
    best, best_outcome = start, first
    seen = {start}
    for axis in axes:
        budget = budget_of(best) if axis == "batch" and time_left() else None
        found: list[Trial] = []
        for proposed in proposals(axis, best, context, budget):
            if proposed.setting in seen:
                continue
            seen.add(proposed.setting)
            if proposed.refusal:
                found.append(_refused(axis, proposed.setting, None, proposed.refusal))
            elif not time_left():
                found.append(
                    Trial(axis=axis, setting=proposed.setting, outcome=None, verdict="not tried", reason="time was up")
                )
            else:
                outcome = measure(proposed.setting)
                reason = _refusal(outcome, best_outcome, tolerance)
                found.append(_refused(axis, proposed.setting, outcome, reason))
        able = [trial for trial in found if isinstance(trial.outcome, Timed) and not trial.reason]
        if able:
            winner = min(able, key=_seconds)
            for at, trial in enumerate(found):
                if trial is winner:
                    found[at] = Trial(axis=axis, setting=trial.setting, outcome=trial.outcome, verdict="taken")
                elif trial in able:
                    reason = f"{winner.setting.name} is faster"
                    found[at] = _refused(axis, trial.setting, trial.outcome, reason)
            best = winner.setting
            if isinstance(winner.outcome, Timed):
                best_outcome = winner.outcome
        trials += found
    return Search(trials=tuple(trials), start=first, best=best, best_outcome=best_outcome, tolerance=tolerance)


def _seconds(trial: Trial) -> float:
    return trial.outcome.seconds_per_image if isinstance(trial.outcome, Timed) else math.inf


def _refused(axis: str, setting: Setting, outcome: Outcome | None, reason: str) -> Trial:
    return Trial(axis=axis, setting=setting, outcome=outcome, verdict="refused", reason=reason)


def _refusal(outcome: Outcome, best: Timed, tolerance: float) -> str:
    """Why a setting is not taken, empty where it may be. What it does to the labels counts before its speed."""
    if isinstance(outcome, Failed):
        return outcome.reason
    if outcome.failed:
        return f"{outcome.failed} of {outcome.images} images fail that do not in fp32"
    if outcome.loss > tolerance:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in outcome.figures.items())
        return f"loss {outcome.loss:.4f} is over the tolerance of {tolerance:g} ({figures})"
    if outcome.seconds_per_image > best.seconds_per_image * (1 - GAIN):
        return f"{best.seconds_per_image / outcome.seconds_per_image:.2f} times as fast as the best before it"
    return ""


def _plain(trial: Trial) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "axis": trial.axis,
        "options": dict(trial.setting.options),
        "resources": dict(trial.setting.resources),
        "verdict": trial.verdict,
        "reason": trial.reason,
    }
    if isinstance(trial.outcome, Timed):
        outcome = trial.outcome
        plain |= {
            "seconds_per_image": outcome.seconds_per_image,
            "setup_s": outcome.setup_s,
            "images": outcome.images,
            "loss": outcome.loss if math.isfinite(outcome.loss) else None,
            "figures": {name: value if math.isfinite(value) else None for name, value in outcome.figures.items()},
            "failed": outcome.failed,
            "equal": outcome.equal,
        }
    return plain
