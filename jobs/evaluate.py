"""Score predictions: `maskmill evaluate CONFIG.yaml [dotted.key=value ...]`, or as `python -m jobs.evaluate`."""

import sys
import time
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from jobs.common import config_job
from jobs.driver import books_kept, drive, leave, signals_interrupt
from pipeline.config import EvaluateConfig
from pipeline.dataflow import cluster
from pipeline.dataflow.evaluate import evaluate_windows
from pipeline.errors import FailureBudgetExceeded
from pipeline.predictions.base import PredictionSource
from pipeline.predictions.registry import open_predictions
from pipeline.progress import Reporter, counted, counts_table, duration
from pipeline.rows import SCORES
from pipeline.run import Run, output_of, row_to_work
from pipeline.schema import MODEL
from pipeline.scoring import evaluated_models
from pipeline.sources.registry import open_source
from pipeline.stages.evaluate import STRANGERS, EvaluatePlan, Evaluator
from pipeline.units import extra_unit, plan_table

__all__ = ["evaluate", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return config_job("evaluate", EvaluateConfig, evaluate, sys.argv[1:] if argv is None else argv)


def evaluate(config: EvaluateConfig) -> int:
    """Score predictions to the end. Raises RunError; everything committed by then stays."""
    reporter = Reporter("scoring")
    uri, storage = output_of(config)
    predictions = open_predictions(config.predictions, config.source)
    models, scorers = evaluated_models(config, predictions)
    started = time.monotonic()
    plan = predictions.prepare(plan_table(open_source(config.source).plan(images=False)))
    if predictions.names(models[0]["label"]) is not None:
        plan = pa.concat_tables([plan, extra_unit(STRANGERS, plan)])
    reporter.say(f"planned {counted(len(plan), 'unit')} in {time.monotonic() - started:.1f} s")
    run = Run(config, plan, models, SCORES)

    def ordinary() -> pa.Table:
        work = run.pending()
        return work.filter(pc.not_equal(work.column("shard_id"), STRANGERS))

    with signals_interrupt():
        run.begin()
        left = len(ordinary())
    if left:
        cluster.connect(config.ray_address)
    # After connecting: Ray installs handlers of its own.
    with signals_interrupt():
        evaluate_plan = EvaluatePlan(
            source=config.source,
            predictions=predictions,
            labels=tuple(model["label"] for model in models),
            versions=tuple(model["version"] for model in models),
            scorers=tuple(scorers),
            output_uri=uri,
            storage=storage,
            rows_per_file=config.output.rows_per_file,
            run_id=run.run_id,
        )
        workers = None if config.workers == "auto" else config.workers
        with books_kept(run, reporter):
            drive(
                run,
                lambda work: evaluate_windows(work, evaluate_plan, workers),
                reporter,
                commit_interval_s=config.output.commit_interval_s,
                limit=lambda: "score",
                workers="a task per core" if workers is None else f"{counted(workers, 'task')} at once",
                pending=ordinary,
            )
            # Only now is it known which predictions nobody asked for.
            for row in run.pending().to_pylist():
                item = row_to_work(row, len(models))
                for window in Evaluator(evaluate_plan).strangers(item, _strangers(run, predictions)):
                    run.take(window)
                run.commit()
    _summarise(run, reporter)
    run.check_final_budget()
    if run.counts() and not any(count.ok for count in run.counts()):
        raise FailureBudgetExceeded(f"no image could be scored; `maskmill status {uri}` lists why")
    return 0


def _strangers(run: Run, predictions: PredictionSource) -> list[set[str]]:
    """Names of predictions that no target asked for, by model."""
    asked: dict[str, list[pa.Array]] = {label: [] for label in run.versions}
    for batch in run.table.scan([MODEL, "model_version", "prediction"]):
        for label, version in run.versions.items():
            own = pc.and_(pc.equal(batch[MODEL], label), pc.equal(batch["model_version"], version))
            asked[label].append(batch["prediction"].filter(own).drop_null())
    result: list[set[str]] = []
    for label, parts in asked.items():
        names = predictions.names(label)
        known = pa.concat_arrays(parts) if parts else pa.array([], pa.string())
        result.append(set() if names is None else set(names.filter(pc.invert(pc.is_in(names, known))).to_pylist()))
    return result


def _summarise(run: Run, reporter: Reporter) -> None:
    seconds = time.monotonic() - run.started
    reporter.console.print(counts_table(run.counts()))
    if run.rows:
        reporter.say(
            f"this run: {run.images} images, {run.rows} rows ({run.failed} without a score) in {duration(seconds)}, "
            f"{run.images / seconds:.1f} img/s, {counted(run.commits, 'commit')}"
        )
    else:
        reporter.say(f"nothing was left to score; looked for {duration(seconds)}")
    reporter.say(f"scores: {run.uri}  (run {run.run_id}, see run.json)")
    reporter.say(f"  maskmill report {run.uri}    maskmill status {run.uri}")


if __name__ == "__main__":
    leave(main())
