"""A search for settings as lines for people."""

import math
from collections.abc import Iterator

from pipeline.tune.search import Failed, Search, Timed, Trial

__all__ = ["lines"]


def lines(found: Search) -> Iterator[str]:
    """Whoever prints them makes them printable."""
    yield f"{'':<11}{'ms an image':>12}{'speed':>8}{'loss':>10}{'set-up s':>10}  setting"
    for trial in found.trials:
        yield f"{trial.verdict:<11}{_figures(trial, found.start)}  {trial.setting.name}"
        if trial.reason:
            yield f"{'':<11}  {trial.reason}"
    best = found.best_outcome
    if found.best == found.trials[0].setting:
        yield f"nothing is faster within a loss of {found.tolerance:g}; fp32 as it is stays"
        return
    yield (
        f"best: {found.best.name}: {found.speedup:.2f} times fp32, loss {best.loss:.4f} of at most {found.tolerance:g}"
        f"{_named(best)}, {best.equal} of {best.images} images equal to the last pixel"
    )
    gained = found.start.seconds_per_image - best.seconds_per_image
    later = best.setup_s - found.start.setup_s
    if later > 0 and gained > 0:
        images = math.ceil(later / gained)
        yield f"its set-up takes {later:.1f} s more in each worker, which pays from {images:,} images on"


def _figures(trial: Trial, start: Timed) -> str:
    outcome = trial.outcome
    if not isinstance(outcome, Timed):
        word = "failed" if isinstance(outcome, Failed) else "-"
        return f"{word:>12}{'-':>8}{'-':>10}{'-':>10}"
    speed = start.seconds_per_image / outcome.seconds_per_image
    return f"{outcome.seconds_per_image * 1e3:>12.2f}{speed:>8.2f}{outcome.loss:>10.4f}{outcome.setup_s:>10.1f}"


def _named(outcome: Timed) -> str:
    text = ", ".join(f"{name} {value:.4f}" for name, value in outcome.figures.items())
    return f" ({text})" if text else ""
