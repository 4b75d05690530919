"""The PromQL in rules and dashboards: where it is, and which metrics it names. Evaluates nothing."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

RULES = "deploy/monitoring/rules.yml"
DASHBOARDS = "deploy/monitoring/grafana/dashboards"
ADAPTER_RULES = "deploy/kubernetes/overlays/replicas/adapter-rules.yml"

FROM_PROMETHEUS = frozenset({"up", "scrape_duration_seconds"})
"""Metrics that Prometheus itself makes of every target."""

_VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$instance": "a"}
_KEYWORDS = frozenset({"and", "or", "unless", "bool", "offset", "ignoring", "on", "by", "without", "Inf", "NaN"})
_NO_METRICS = [
    r'"[^"]*"',  # label values
    r"\{[^}]*\}",  # label names
    r"\[[^\]]*\]",  # durations
    r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",  # label names
    r"\b[a-zA-Z_]\w*\s*(?=\()",  # functions and aggregations
    r"\b\d[\w.]*",  # numbers and durations
]


def recorded_names(root: Path) -> set[str]:
    """Metrics that recording rules make."""
    return {rule["record"] for rule in _rules(root) if "record" in rule}


def expressions(root: Path) -> Iterator[tuple[str, str]]:
    """Every expression of rules and dashboards, variables filled in, with the name of where it is."""
    for rule in _rules(root):
        yield rule.get("alert") or rule["record"], rule["expr"]
    for file in sorted((root / DASHBOARDS).glob("*.json")):
        for panel in json.loads(file.read_text(encoding="utf-8"))["panels"]:
            for target in panel.get("targets", ()):
                yield f"{file.stem}: {panel['title']}", _fill_in(target["expr"])
    for rule in yaml.safe_load((root / ADAPTER_RULES).read_text(encoding="utf-8")):
        yield "adapter-rules.yml", rule["seriesQuery"]


def metric_names(expression: str) -> set[str]:
    """The metrics that an expression asks for."""
    for pattern in _NO_METRICS:
        expression = re.sub(pattern, " ", expression)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", expression)) - _KEYWORDS


def exported_names(scrape: str) -> set[str]:
    """The names under which the metrics of a scrape can be asked for, also of those that have no series yet."""
    names: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", scrape, re.MULTILINE):
        names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return names | set(re.findall(r"^([a-zA-Z_:][\w:]*)[{ ]", scrape, re.MULTILINE))


def _rules(root: Path) -> list[dict[str, str]]:
    groups = yaml.safe_load((root / RULES).read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _fill_in(expression: str) -> str:
    for variable, value in _VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression
