"""What stands at a labelling run's output already, and whether this run would go on with it. Nothing is changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from pipeline import units
from pipeline.config import LabelConfig
from pipeline.deltacalls import delta_errors, is_table
from pipeline.errors import RunError, SchemaError, StorageError
from pipeline.preflight.finding import Findings
from pipeline.runfile import read_run
from pipeline.status import table_counts
from pipeline.storage import delta_options
from pipeline.table import RowTable
from pipeline.units import UnitLog

__all__ = ["Existing", "check_existing"]

# A run commits every few seconds; one that said nothing for so long is taken for dead.
SILENCE_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Existing:
    """A table that is there. run_id, state: of the last run. done: rows of each model of this config, failed too."""

    run_id: str
    state: str
    done: dict[str, int]


def check_existing(
    config: LabelConfig, plan: pa.Table | None, models: Sequence[Mapping[str, Any]], *, now: datetime | None = None
) -> tuple[Findings, Existing | None]:
    """plan: of the source, None where it could not be listed. models: `LoadedModel.describe()` of those that load."""
    found = Findings()
    uri, storage = config.output.uri, config.output.storage
    try:
        if not is_table(uri.removeprefix("file://"), delta_options(storage)):
            return found, None
        table = RowTable.open(uri, storage)
        run = read_run(uri, storage)
        lines = UnitLog(uri, storage).read()
        last_commit = _last_commit(uri, storage)
    except SchemaError as error:
        found.problem("output.uri", str(error), "choose an output.uri of its own")
        return found, None
    except StorageError as error:
        found.problem("output.uri", f"the table there cannot be read: {error}", "make it readable, or choose another")
        return found, None
    if run.get("job") not in (None, "label"):
        text = f"expected an output of label at {uri}, got one of {run.get('job')}"
        found.problem("output.uri", text, "choose an output.uri of its own")
        return found, None
    silent_s = ((now or datetime.now(UTC)) - last_commit).total_seconds()
    if run.get("state") == "running":
        if silent_s < SILENCE_S:
            found.problem(
                "output.uri",
                f"run {run['run_id']} seems to be at work there: its last commit is {silent_s:.0f} s old",
                "wait for it, or stop it: a run that starts now would take the table over and end the other",
            )
        else:
            found.notes.append(f"run {run['run_id']} did not end in order; this run takes its table over and goes on")
    _check_models(found, run, models)
    if plan is not None:
        _check_plan(found, config, plan, lines, table)
    versions = {model["label"]: model["version"] for model in models}
    try:
        done = {count.model: count.ok + count.failed for count in table_counts(table, UnitLog(uri, storage), versions)}
    except RunError as error:
        found.problem("output.uri", f"the rows there cannot be counted: {error}", "make them readable")
        done = {}
    return found, Existing(run_id=run["run_id"], state=str(run.get("state")), done=done)


def _last_commit(uri: str, storage: Mapping[str, Any]) -> datetime:
    with delta_errors(f"output {uri}"):
        history = DeltaTable(uri.removeprefix("file://"), storage_options=delta_options(storage)).history(1)
    return datetime.fromtimestamp(history[0]["timestamp"] / 1000, UTC) if history else datetime.fromtimestamp(0, UTC)


def _check_models(found: Findings, run: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> None:
    before = {model["label"]: model["version"] for model in run["models"]}
    for model in models:
        old = before.get(model["label"])
        if old is not None and old != model["version"]:
            found.notes.append(
                f"model {model['label']} was version {old} in the last run there and is {model['version']} now: its "
                "rows are made anew beside the old ones (models.N.label keeps them apart)"
            )
    others = sorted(set(before) - {model["label"] for model in models})
    if models and others:
        found.notes.append(f"the table has rows of further models, which stay: {', '.join(others)}")


def _check_plan(found: Findings, config: LabelConfig, plan: pa.Table, lines: pa.Table, table: RowTable) -> None:
    known = units.planned(lines).column("shard_id")
    if not len(known):
        return
    shared = pc.sum(pc.is_in(known, value_set=plan.column("shard_id").combine_chunks())).as_py() or 0
    if not shared:
        found.problem(
            "output.uri",
            f"the table there is of another source: none of its {len(known)} units (for example "
            f"{known[0].as_py()}) is among the {len(plan)} of source.uri",
            "choose an output.uri of its own, or correct source.uri",
        )
        return
    if shared < len(known):
        found.notes.append(f"{len(known) - shared} of the table's {len(known)} units are not in the source any more")
    changed = plan.filter(units.changed(plan, lines)).column("shard_id")
    affected = changed.filter(pc.is_in(changed, value_set=table.shards())) if len(changed) else changed
    if not len(affected):
        return
    text = f"{len(affected)} units changed after they were labelled, for example {affected[0].as_py()}"
    if config.on_changed == "stop":
        found.problem("on_changed", text, "on_changed=relabel drops their rows and labels them again")
    else:
        found.notes.append(f"{text}: their rows will be dropped and made again")
