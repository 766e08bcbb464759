"""Writes infra/observability/dashboard.json from the table of panels below: `python scripts/grafana_dashboard.py`."""

import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "infra" / "observability" / "dashboard.json"
WIDTH, HEIGHT, COLUMNS = 8, 8, 24
RATE = "[$__rate_interval]"

# A row's name, then its panels: (title, unit, what it tells, {legend: expression}). Ray puts ray_ before our names.
ROWS: tuple[tuple[str, tuple[tuple[str, str, str, dict[str, str]], ...]], ...] = (
    (
        "Progress",
        (
            (
                "Images per second",
                "cps",
                "Rows that ended, by model and status.",
                {"{{model}} {{status}}": f"sum by (model, status) (rate(ray_maskmill_images_total{RATE}))"},
            ),
            (
                "Failed share",
                "percentunit",
                "Of the rows of the last five minutes; failure_budget stops the run by the whole run's share.",
                {
                    "{{model}}": 'sum by (model) (rate(ray_maskmill_images_total{status="failed"}[5m]))'
                    " / sum by (model) (rate(ray_maskmill_images_total[5m]))"
                },
            ),
            (
                "Rows committed per second",
                "cps",
                "What is in the table for good. It follows the images in steps of output.commit_interval_s.",
                {"rows": f"sum(rate(ray_maskmill_rows_committed_total{RATE}))"},
            ),
            (
                "Commit lag",
                "s",
                "Age of the oldest written row that is not committed.",
                {"lag": "max(ray_maskmill_commit_lag_seconds)"},
            ),
            (
                "Bytes read per second",
                "Bps",
                "From storage, before decoding.",
                {"read": f"sum(rate(ray_maskmill_bytes_read_total{RATE}))"},
            ),
            (
                "Cost so far",
                "short",
                "By the node prices of the config, in their currency.",
                {"cost": "max(ray_maskmill_cost)"},
            ),
        ),
    ),
    (
        "Where the time goes",
        (
            (
                "Seconds per second in each stage",
                "short",
                "Threads at work in a stage, on average, over all workers. Much wait: the accelerator starves.",
                {"{{stage}}": f"sum by (stage) (rate(ray_maskmill_stage_seconds_total{RATE}))"},
            ),
            (
                "Accelerator busy",
                "percentunit",
                "Share of the time in which a worker's device computes.",
                {
                    "mean": "avg(ray_maskmill_accelerator_busy_share)",
                    "least": "min(ray_maskmill_accelerator_busy_share)",
                },
            ),
            (
                "Items in queues",
                "short",
                "A full queue stands before the stage that is too slow, an empty one after it.",
                {"{{queue}}": "sum by (queue) (ray_maskmill_queue_items)"},
            ),
            (
                "Pixels in a batch",
                "short",
                "Padding included. It falls when batches are cut, or halved for memory.",
                {"mean": "avg(ray_maskmill_batch_pixels)"},
            ),
        ),
    ),
    (
        "Training",
        (
            (
                "Images learned from per second",
                "cps",
                "Over all workers; the gauge is what the run itself says of the last minute.",
                {
                    "images": f"sum(rate(ray_maskmill_train_images_total{RATE}))",
                    "last minute": "max(ray_maskmill_train_images_per_second)",
                },
            ),
            ("Loss", "short", "Of the last step.", {"loss": "max(ray_maskmill_train_loss)"}),
        ),
    ),
    (
        "Nodes",
        (
            ("Nodes", "short", "Nodes that report, the head among them.", {"nodes": "count(ray_node_cpu_count)"}),
            ("CPU", "percent", "By node.", {"{{instance}}": "avg by (instance) (ray_node_cpu_utilization)"}),
            (
                "GPU",
                "percent",
                "By node and GPU, as the driver reports it.",
                {"{{instance}} {{GpuIndex}}": "avg by (instance, GpuIndex) (ray_node_gpus_utilization)"},
            ),
            (
                "GPU memory",
                "decmbytes",
                "By node and GPU.",
                {"{{instance}} {{GpuIndex}}": "avg by (instance, GpuIndex) (ray_node_gram_used)"},
            ),
            (
                "Memory",
                "percentunit",
                "By node; Ray ends tasks from 0.95 on.",
                {"{{instance}}": "max by (instance) (ray_node_mem_used) / max by (instance) (ray_node_mem_total)"},
            ),
            (
                "Object store",
                "bytes",
                "By place; what is spilled lies on disk.",
                {"{{Location}}": "sum by (Location) (ray_object_store_memory)"},
            ),
            (
                "Network",
                "Bps",
                "Over all nodes.",
                {
                    "received": "sum(ray_node_network_receive_speed)",
                    "sent": "sum(ray_node_network_send_speed)",
                },
            ),
            (
                "Disk used",
                "percentunit",
                "By node.",
                {
                    "{{instance}}": "max by (instance) (ray_node_disk_usage)"
                    " / (max by (instance) (ray_node_disk_usage) + max by (instance) (ray_node_disk_free))"
                },
            ),
            (
                "Actors",
                "short",
                "By state; many restarts are nodes that die.",
                {"{{State}}": "sum by (State) (ray_actors)"},
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """Grafana's JSON model: rows of three panels each, read from the data source that the viewer picks."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row_title, row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row_title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
                "panels": [],
            }
        )
        top += 1
        for index, (title, unit, description, expressions) in enumerate(row):
            column, line = index % (COLUMNS // WIDTH), index // (COLUMNS // WIDTH)
            panels.append(
                {
                    "id": len(panels) + 1,
                    "type": "timeseries",
                    "title": title,
                    "description": description,
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "gridPos": {"x": column * WIDTH, "y": top + line * HEIGHT, "w": WIDTH, "h": HEIGHT},
                    "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                    "options": {
                        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
                        "tooltip": {"mode": "multi", "sort": "desc"},
                    },
                    "targets": [
                        {
                            "refId": chr(ord("A") + number),
                            "datasource": {"type": "prometheus", "uid": "${datasource}"},
                            "expr": expression,
                            "legendFormat": legend,
                        }
                        for number, (legend, expression) in enumerate(expressions.items())
                    ],
                }
            )
        top += HEIGHT * -(-len(row) // (COLUMNS // WIDTH))
    return {
        "uid": "maskmill",
        "title": "maskmill",
        "tags": ["maskmill", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [{"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}]
        },
        "annotations": {"list": []},
        "panels": panels,
    }


def text() -> str:
    """What stands in the file."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"{TARGET}\n")
