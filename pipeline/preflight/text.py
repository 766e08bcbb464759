"""A preflight's report as lines for people."""

from collections.abc import Iterator

from pipeline.preflight.checks import Report
from pipeline.preflight.estimate import Interval
from pipeline.preflight.measure import Measured
from pipeline.preflight.propose import Node
from pipeline.preflight.survey import Failure, SourceFindings
from pipeline.progress import counted, duration
from pipeline.redaction import redact_text

__all__ = ["lines"]

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def lines(report: Report) -> list[str]:
    """Without credentials; whoever prints them makes them printable."""
    return [redact_text(line) for line in _lines(report)]


def _lines(report: Report) -> Iterator[str]:
    measured = report.measured
    if measured is not None and measured.source is not None:
        yield from _source(measured.source)
    elif report.corpus is not None:
        yield f"source    {report.corpus.units} units"
    if measured is not None:
        for model in measured.models:
            yield (
                f"model     {model['label']} {model['version']}, {model['parameters'] / 1e6:.1f} M parameters, "
                f"taxonomy {model['taxonomy']['name']}, licence {model['license']}"
            )
        yield from _speed(measured)
    yield from _output(report)
    yield from _plan(report)
    for note in report.findings.notes:
        yield f"note      {note}"
    for problem in report.findings.problems:
        yield f"problem   {problem.where}: {problem.what}"
        yield f"          -> {problem.remedy}"
    count = len(report.findings.problems)
    yield f"{count} problem{'s' if count != 1 else ''}" if count else "no problem found"


def _source(source: SourceFindings) -> Iterator[str]:
    size = "unknown" if source.size_bytes is None else _bytes(source.size_bytes)
    yield f"source    {_between(source.images, ',.0f', ' images')} in {source.units:,} units, {size}"
    yield f"          looked at {source.looked_at} images of {counted(source.units_looked_at, 'unit')}"
    if source.looked_at:
        yield f"          {_between(source.failed_share.scaled(100), '.2f', ' %')} cannot be labelled"
    yield from _failures(source.failures)
    if source.median_size and source.p95_size and source.largest_size:
        yield (
            f"          sizes {_size(source.median_size)} (median), {_size(source.p95_size)} (95 %), "
            f"{_size(source.largest_size)} (largest); {(source.median_bytes or 0) / 1e3:,.0f} kB each (median)"
        )


def _failures(failures: tuple[Failure, ...]) -> Iterator[str]:
    for failure in failures[:5]:
        yield f"          {failure.images} x {failure.kind} ({failure.stage}), for example {failure.examples[0]}"


def _speed(measured: Measured) -> Iterator[str]:
    source = measured.source
    if source is not None and source.decode_s is not None and source.prepare_s is not None:
        prepared = f", prepare {source.prepare_s * 1e3:.2f} ms" if measured.own_pixels else ""
        yield f"speed     on {measured.device}: decode {source.decode_s * 1e3:.2f} ms{prepared} an image and core"
    for trial in measured.trials:
        yield f"          {trial.label}, {trial.padded[1]}x{trial.padded[0]} pixels, by batch budget:"
        for point in trial.points:
            used = f"process {point.peak_bytes / 1e9:.2f} GB"
            if point.accelerator_bytes is not None:
                used = f"GPU {point.accelerator_bytes / 1e9:.2f} GB, {used}"
            marks = [
                text
                for text, holds in (
                    ("the config's", point.budget_pixels == measured.own_pixels),
                    ("proposed", point.budget_pixels == measured.best_pixels),
                    (point.problem or "", point.problem),
                )
                if holds
            ]
            yield (
                f"          {point.budget_pixels:>12,} pixels  {point.images:>4} images  "
                f"{point.seconds_per_image * 1e3:>9.2f} ms an image  {used}"
                f"{'  <- ' + ', '.join(marks) if marks else ''}"
            )
        yield f"          (ended by {trial.ended})"
    done = measured.rehearsal
    if done is not None and done.images:
        stages = ", ".join(f"{stage} {done.seconds[stage] / done.images * 1e3:.2f}" for stage in done.seconds)
        rate = f"{done.images / done.wall_s:.1f} images/s"
        yield f"          {done.images} images labelled in {done.wall_s:.1f} s by one worker: {rate}"
        yield f"          thread ms an image: {stages}"
        used = f"process {done.peak_bytes / 1e9:.2f} GB"
        if done.accelerator_bytes is not None:
            used = f"GPU {done.accelerator_bytes / 1e9:.2f} GB, {used}"
        yield f"          memory at most: {used}"
        rows = ", ".join(f"{label} {size / 1e3:.1f} kB" for label, size in done.row_bytes.items())
        yield f"          bytes a row: {rows}"
        yield from _failures(tuple(item for item in done.failures if item.stage not in ("read", "decode")))


def _output(report: Report) -> Iterator[str]:
    text = "list, write, read and delete work" if not _broken(report) else "see the problems"
    room = "" if report.free_bytes is None else f"; {report.free_bytes / 1e9:,.1f} GB free"
    need = ""
    if report.projection is not None:
        need = f"; the rows will take {_bytes(report.projection.output_bytes)}"
    yield f"output    {text}{room}{need}"
    if report.existing is not None:
        done = ", ".join(f"{label} {rows:,} rows" for label, rows in report.existing.done.items()) or "no rows"
        yield f"          a table is there (run {report.existing.run_id}, {report.existing.state}): {done}"


def _broken(report: Report) -> bool:
    return any(item.where == "output.uri" and item.what.startswith("cannot ") for item in report.findings.problems)


def _plan(report: Report) -> Iterator[str]:
    if report.proposal is not None and report.proposal.values:
        yield f"proposal  for {_nodes(report.nodes)}:"
        for name, value in report.proposal.values.items():
            yield f"          resources.{name}={value}  ({report.proposal.reasons[name]})"
    found = report.projection
    if found is None:
        return
    yield (
        f"run       {found.rate:,.1f} images/s with {found.workers} worker{'s' if found.workers > 1 else ''} "
        f"(limit: {found.limit}); {_between(found.images, ',.0f', ' images')} to do take {_time(found.hours)}"
    )
    if report.cost is not None:
        price, currency = report.cost
        yield f"          cost {_between(price, ',.2f', ' ' + currency if currency else '')}"


def _nodes(nodes: tuple[Node, ...]) -> str:
    kinds: dict[str, int] = {}
    for node in nodes:
        gpus = f" and {node.gpus:g} GPU" if node.gpus else ""
        name = f"{node.cpus:g} CPU{gpus}"
        kinds[name] = kinds.get(name, 0) + 1
    return ", ".join(f"{count} node{'s' if count > 1 else ''} of {name}" for name, count in kinds.items())


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _between(value: Interval, form: str, unit: str) -> str:
    if value.exact:
        return f"{value.value:{form}}{unit}"
    return f"about {value.value:{form}}{unit} ({value.low:{form}} to {value.high:{form}})"


def _bytes(size: Interval) -> str:
    """In the unit of which its highest value has at least one."""
    scale, unit = next((pair for pair in UNITS if size.high >= pair[0]), UNITS[-1])
    return _between(size.scaled(1 / scale), ".3g", f" {unit}")


def _time(hours: Interval) -> str:
    text = duration(hours.value * 3600)
    return text if hours.exact else f"about {text} ({duration(hours.low * 3600)} to {duration(hours.high * 3600)})"
