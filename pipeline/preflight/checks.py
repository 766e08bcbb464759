"""A preflight from its config to its report: the plan, what a worker measured, the output, and what follows."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.config import LabelConfig
from pipeline.config_train import TrainConfig
from pipeline.errors import ConfigError, RunError
from pipeline.preflight.estimate import Interval
from pipeline.preflight.existing import Existing, check_existing
from pipeline.preflight.finding import Findings
from pipeline.preflight.measure import Measured, Options
from pipeline.preflight.probe import check_space, probe_output
from pipeline.preflight.propose import Node, Projection, Proposal, cost_of, project, propose
from pipeline.preflight.sampling import Corpus, choose_units, describe_plan
from pipeline.preflight.survey import SourceFindings
from pipeline.redaction import redact_text
from pipeline.sources.base import Unit
from pipeline.sources.registry import open_source
from pipeline.units import plan_table

__all__ = ["Measure", "Report", "check"]

# Measures a config's sample somewhere. Raises RunError where that place cannot do it.
Measure = Callable[[LabelConfig | TrainConfig, Sequence[Unit], Corpus, Options], Measured]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a preflight found. What could not be found out is None, and a problem says why."""

    job: str
    findings: Findings
    corpus: Corpus | None
    measured: Measured | None
    existing: Existing | None
    free_bytes: int | None
    nodes: tuple[Node, ...]
    proposal: Proposal | None
    projection: Projection | None
    cost: tuple[Interval, str] | None

    def plain(self) -> dict[str, Any]:
        """JSON's values, without credentials. What is not finite is null."""
        tree = asdict(self)
        if tree["measured"] is not None:
            tree["measured"].pop("findings")
        result: dict[str, Any] = json.loads(redact_text(json.dumps(_finite(tree))))
        return result


def check(config: LabelConfig | TrainConfig, options: Options, nodes: Sequence[Node], measure: Measure) -> Report:
    """nodes: of the cluster that the run would use. Problems are collected, so that all are seen at once.

    Raises ConfigError where the config itself is wrong.
    """
    found = Findings()
    label = isinstance(config, LabelConfig)
    plan = _plan(config, found)
    corpus = None if plan is None else describe_plan(plan, config.source.limit)
    uri, storage = config.output.uri, config.output.storage
    found.add(probe_output(uri, storage, delta=label))

    measured = None
    if plan is not None and corpus is not None:
        try:
            measured = measure(config, choose_units(plan, options.units, options.seed), corpus, options)
        except ConfigError:
            raise
        except RunError as error:
            found.problem("resources", str(error), "give workers more memory, or smaller batch_pixels")
    if measured is not None:
        found.add(measured.findings)
        if measured.source is not None:
            _judge_source(found, config, measured.source)

    existing = None
    if isinstance(config, LabelConfig):
        below, existing = check_existing(config, plan, measured.models if measured else ())
        found.add(below)
    proposal = projection = None
    if isinstance(config, LabelConfig) and measured is not None and measured.rehearsal is not None:
        proposal, projection = _project(config, nodes, measured, existing, found)
    space, free = check_space(uri, storage, projection.output_bytes.high if projection else None)
    found.add(space)
    return Report(
        job="label" if label else "train",
        findings=_once(found),
        corpus=corpus,
        measured=measured,
        existing=existing,
        free_bytes=free,
        nodes=tuple(nodes),
        proposal=proposal,
        projection=projection,
        cost=cost_of(config, nodes, projection) if projection and isinstance(config, LabelConfig) else None,
    )


def _plan(config: LabelConfig | TrainConfig, found: Findings) -> pa.Table | None:
    try:
        plan = plan_table(open_source(config.source).plan())
    except RunError as error:
        found.problem("source", str(error), "correct source.uri, or let these credentials list and read it")
        return None
    if not len(plan):
        found.problem("source", "expected images, got none", "correct source.uri")
        return None
    return plan


def _judge_source(found: Findings, config: LabelConfig | TrainConfig, source: SourceFindings) -> None:
    if not source.looked_at:
        found.problem("source", f"no image in {source.units_looked_at} units that were looked at", "correct source.uri")
        return
    share, budget = source.failed_share, config.failure_budget
    kinds = "; ".join(f"{failure.kind}, for example {failure.examples[0]}" for failure in source.failures[:2])
    remedy = "repair or leave out those images, or raise failure_budget"
    if share.low > budget:
        text = (
            f"expected at most {budget:.2%} of the images to fail, got {share.value:.2%} ({share.low:.2%} to "
            f"{share.high:.2%}): {kinds}"
        )
        found.problem("failure_budget", text, remedy)
    elif share.value > budget:
        found.notes.append(
            f"{share.value:.2%} of the sample fails, over failure_budget ({budget:.2%}), but it is small: {kinds}"
        )
    for shard_id, cut in source.cut:
        found.problem("source", f"unit {shard_id} ends early: {cut}", "write it again; what follows there is no row")
    if isinstance(config, TrainConfig) and source.targets_share < 1 - budget:
        text = f"expected a target for at least {1 - budget:.2%} of the images, got {source.targets_share:.2%}"
        found.problem("source", text, "give source.targets, or leave those images out")


def _project(
    config: LabelConfig, nodes: Sequence[Node], measured: Measured, existing: Existing | None, found: Findings
) -> tuple[Proposal | None, Projection | None]:
    rehearsal, source = measured.rehearsal, measured.source
    if rehearsal is None or source is None or not rehearsal.images:
        return None, None
    predicted = [failure for failure in rehearsal.failures if failure.stage not in ("read", "decode")]
    count = sum(failure.images for failure in predicted)
    if rehearsal.rows and count / rehearsal.rows > config.failure_budget:
        text = f"{count} of {rehearsal.rows} rows failed in the model or after it: {predicted[0].examples[0]}"
        found.problem("models", text, "look at these images and the model's options")
    proposal, problems = propose(config, nodes, rehearsal, measured.best_pixels)
    for text in problems:
        found.problem("resources", text, "start such nodes, or change resources.gpus_per_worker")
    if not proposal.values:
        return None, None
    if proposal.values.get("gpus_per_worker") and not measured.accelerator:
        found.notes.append(
            "measured without an accelerator, so nothing is said of how long the run takes on GPUs; "
            "set ray_address to measure where it will run"
        )
        values = {name: value for name, value in proposal.values.items() if name == "workers"}
        return replace(proposal, values=values, reasons={name: proposal.reasons[name] for name in values}), None
    if source.images.value and math.isfinite(source.images.value):
        done = min(existing.done.values(), default=0) if existing else 0
        images = source.images
        left = Interval(*(max(0.0, bound - done) for bound in (images.value, images.low, images.high)))
        return proposal, project(proposal, nodes, rehearsal, left, measured.cores)
    return proposal, None


def _once(found: Findings) -> Findings:
    return Findings(problems=list(dict.fromkeys(found.problems)), notes=list(dict.fromkeys(found.notes)))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
