"""Label a corpus: `maskmill label CONFIG.yaml [dotted.key=value ...]`, or the same as `python -m jobs.label`."""

import sys
import time
from collections.abc import Sequence

from jobs.common import config_job
from jobs.driver import books_kept, drive, leave, signals_interrupt
from pipeline.config import LabelConfig
from pipeline.dataflow import cluster
from pipeline.dataflow.label import label_windows, resolve_models
from pipeline.dataflow.metrics import RayMetrics, cost_meter
from pipeline.models.licences import licence_warning
from pipeline.models.load import check_models
from pipeline.observe.log import open_log
from pipeline.observe.observer import Observer
from pipeline.progress import Reporter, counted, counts_table, duration, stage_shares
from pipeline.run import Run
from pipeline.scoring import plan_scorers
from pipeline.sources.registry import open_source
from pipeline.stages.work import LabelPlan
from pipeline.units import plan_table

__all__ = ["label", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return config_job("label", LabelConfig, label, sys.argv[1:] if argv is None else argv)


def label(config: LabelConfig) -> int:
    """Run one labelling job to its end. Raises RunError; everything committed by then stays."""
    reporter = Reporter("labelling")
    log = open_log(config.log.path)
    check_models(config.models)
    started = time.monotonic()
    plan = plan_table(open_source(config.source).plan())
    reporter.say(f"planned {counted(len(plan), 'unit')} in {time.monotonic() - started:.1f} s")
    cluster.connect(config.ray_address, config.resources.object_store_bytes)
    # After connecting: Ray installs handlers of its own.
    with signals_interrupt():
        meter = cost_meter(config.cost)
        pool = cluster.plan_pool(config.resources, say=reporter.say)
        models = resolve_models(config, pool)
        for model, given in zip(models, config.models, strict=True):
            warning = ""
            if given.weights == "none" and model["parameters"]:
                warning = "  (random weights: give models.N.weights)"
            reporter.say(
                f"model {model['label']} {model['version']}, {model['parameters'] / 1e6:.1f} M parameters, "
                f"taxonomy {model['taxonomy']['name']}, licence {model['license']}{warning}"
            )
            if not model["commercial"]:
                reporter.say(licence_warning(model["label"], model["license"]))
        scorers, notes = plan_scorers(config.score, config.source, models, asked="score" in config.model_fields_set)
        for note in notes:
            reporter.say(note)
        run = Run(config, plan, models)
        log.run_id = run.run_id
        run.observer = Observer(log=log, metrics=RayMetrics(), meter=meter, layout=config.resources.layout)
        run.begin()
        if run.orphans:
            reporter.say(f"removed {run.orphans} files that an earlier run wrote but did not commit")
        label_plan = LabelPlan(
            source=config.source,
            models=config.models,
            output=config.output,
            resources=config.resources,
            versions=run.versions,
            scorers=tuple(scorers),
            run_id=run.run_id,
            seed=config.seed,
            notes=bool(log),
        )
        with books_kept(run, reporter):
            drive(
                run,
                lambda work: label_windows(work, label_plan, pool, models),
                reporter,
                commit_interval_s=config.output.commit_interval_s,
                limit=lambda: run.observer.stalls().bound,
                workers=counted(pool.workers, "worker"),
            )
    _summarise(config, run, reporter, pool)
    run.check_final_budget()
    return 0


def _summarise(config: LabelConfig, run: Run, reporter: Reporter, pool: cluster.Pool) -> None:
    seconds = time.monotonic() - run.started
    uri = config.output.uri
    reporter.console.print(counts_table(run.counts()))
    if run.rows:
        shares = "  ".join(f"{stage} {share:.0%}" for stage, share in stage_shares(run.seconds).items())
        reporter.say(
            f"this run: {run.images} images, {run.rows} rows ({run.failed} failed) in {duration(seconds)}, "
            f"{run.images / seconds:.1f} img/s with {counted(pool.workers, 'worker')}, {counted(run.commits, 'commit')}"
        )
        reporter.say(f"thread time: {shares}")
        reporter.say(run.observer.stalls().sentence)
        deaths = run.observer.deaths
        if deaths:
            reporter.say(f"{counted(deaths, 'worker')} died and came back")
    else:
        reporter.say(f"nothing was left to label; looked for {duration(seconds)}")
    bill = run.bill(0)
    if bill is not None:
        reporter.say(bill.sentence())
    reporter.say(f"table: {uri}  (run {run.run_id}, see run.json)")
    reporter.say(f"  maskmill status {uri}    maskmill preview {uri}")
    options = ", storage_options=..." if config.output.storage else ""
    reporter.say(f'  python: deltalake.DeltaTable("{uri}"{options}).to_pyarrow_table(columns=["image_id", "status"])')


if __name__ == "__main__":
    leave(main())
