"""Writes Grafana's two dashboards from the tables in deploy/tables.py: `python -m deploy.dashboards`.

Grafana's own export of a dashboard is a thousand lines that nobody reads; a table of questions and queries is read, and
a test holds the files to it. Knows Grafana's format, no metrics.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.panels import Panel, Row
from deploy.tables import DASHBOARDS

FOLDER = Path(__file__).resolve().parent / "monitoring" / "grafana" / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
NUM_COLUMNS = 24
HEIGHT = 7
SCHEMA_VERSION = 39


def build_dashboard(name: str, title: str, rows: Sequence[Row]) -> dict[str, Any]:
    """A dashboard as Grafana reads it from a file."""
    return {
        "uid": f"ultrafuser-{name}",
        "title": title,
        "tags": ["ultrafuser"],
        "editable": False,
        "refresh": "30s",
        "schemaVersion": SCHEMA_VERSION,
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [_link_to_others()],
        "templating": {"list": [_instance_variable()]},
        "panels": list(_place(rows)),
    }


def write_dashboards(folder: Path) -> None:
    """Write each dashboard's file."""
    for name, (title, rows) in DASHBOARDS.items():
        text = json.dumps(build_dashboard(name, title, rows), indent=2)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _place(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Panels with ids and places: each row's side by side below its title, broken where the width ends."""
    placed: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        place = {"x": 0, "y": top, "w": NUM_COLUMNS, "h": 1}
        placed.append({"type": "row", "id": len(placed) + 1, "title": row.title, "gridPos": place, "panels": []})
        top, left = top + 1, 0
        for panel in row.panels:
            if left + panel.width > NUM_COLUMNS:
                top, left = top + HEIGHT, 0
            place = {"x": left, "y": top, "w": panel.width, "h": HEIGHT}
            placed.append({"id": len(placed) + 1, "gridPos": place, **_panel(panel)})
            left += panel.width
        top += HEIGHT
    return placed


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": expr,
                "legendFormat": legend,
                "format": "heatmap" if panel.kind == "heatmap" else "time_series",
                "instant": panel.kind == "stat",
            }
            for index, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal"} if panel.is_stacked else {"mode": "none"}
        defaults["custom"] = {"fillOpacity": 40 if panel.is_stacked else 5, "showPoints": "never", "stacking": stacking}
    if panel.unit == "bool_on_off":
        off, on = {"color": "red", "text": "no"}, {"color": "green", "text": "yes"}
        defaults["mappings"] = [{"type": "value", "options": {"0": off, "1": on}}]
    return defaults


def _options(panel: Panel) -> Mapping[str, Any]:
    if panel.kind == "stat":
        return {"colorMode": "background", "textMode": "value_and_name", "reduceOptions": {"calcs": ["lastNotNull"]}}
    if panel.kind == "heatmap":
        return {"calculate": False, "yAxis": {"unit": panel.unit}, "color": {"scheme": "Blues"}}
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def _instance_variable() -> dict[str, Any]:
    return {
        "name": "instance",
        "label": "Server",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": "label_values(fused_build_info, instance)", "refId": "instance"},
        "definition": "label_values(fused_build_info, instance)",
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _link_to_others() -> dict[str, Any]:
    return {"type": "dashboards", "tags": ["ultrafuser"], "title": "UltraFuser", "asDropdown": False, "keepTime": True}


if __name__ == "__main__":
    write_dashboards(FOLDER)
