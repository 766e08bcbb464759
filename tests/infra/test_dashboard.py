"""The Grafana dashboard: queries that parse, over metrics that Ray or maskmill exports."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import ray.dashboard.modules.metrics.dashboards as ray_dashboards
import yaml

from pipeline.observe.metrics import METRICS

REPOSITORY = Path(__file__).resolve().parents[2]
OBSERVABILITY = REPOSITORY / "infra" / "observability"

# What maskmill emits, with the labels of each; Ray puts ray_ before a name.
OURS = {name: set(metric.tags) for name, metric in METRICS.items()}


def rays_own() -> set[str]:
    """Names of the metrics that the dashboards of the installed Ray show."""
    (folder,) = ray_dashboards.__path__
    text = "".join(path.read_text(encoding="utf-8") for path in Path(folder).glob("*_panels.py"))
    return set(re.findall(r"\bray_[a-z0-9_]+", text))


def dashboard() -> dict[str, Any]:
    return json.loads((OBSERVABILITY / "dashboard.json").read_text())  # type: ignore[no-any-return]


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def selectors(node: Any) -> Iterator[Any]:
    """Vector selectors of a parsed expression, wherever they stand."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("lhs", "rhs", "expr", "vector_selector", "args", "param"):
        child = getattr(node, name, None)
        for part in child if isinstance(child, list | tuple) else [child]:
            if isinstance(part, promql_parser.Expr):
                yield from selectors(part)


def parsed(expression: str) -> Any:
    return promql_parser.parse(expression.replace("$__rate_interval", "1m"))


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_is_exported(expression: str) -> None:
    names = {selector.name for selector in selectors(parsed(expression))}
    assert names, expression
    assert names <= rays_own() | {f"ray_{name}" for name in OURS}


def test_all_of_our_metrics_are_shown_with_labels_that_they_have() -> None:
    shown: set[str] = set()
    for expression in expressions():
        names = {selector.name.removeprefix("ray_") for selector in selectors(parsed(expression))} & set(OURS)
        shown |= names
        used = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        used |= set(re.findall(r"[{,]\s*(\w+)\s*=", expression))
        for name in names:
            assert used <= OURS[name], expression
    assert shown == set(OURS)


@pytest.mark.parametrize(
    "expression", ["sum by (model (rate(x[5m]))", "rate(ray_maskmill_images_total)", "sum(ray_node_mem_used"]
)
def test_the_parser_refuses_what_prometheus_would(expression: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        promql_parser.parse(expression)


def test_the_panels_fill_the_page_without_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", ()):
            # A legend may name only labels that the expression keeps.
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert labels <= set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))


def test_the_file_is_what_the_table_of_panels_makes() -> None:
    script = REPOSITORY / "scripts" / "grafana_dashboard.py"
    spec = importlib.util.spec_from_file_location("grafana_dashboard", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (OBSERVABILITY / "dashboard.json").read_text() == module.text()


def test_prometheus_reads_the_file_that_ray_writes() -> None:
    config = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    (discovery,) = scrape["file_sd_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert discovery["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
