"""`make check-deploy`: the files pass every tool that can be had, and the tools see the mistakes they are there for."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.checks import __main__ as command
from deploy.checks.checks import CHECKS
from deploy.checks.promql import expressions, metric_names
from deploy.checks.tools import ROOT, Failed, NotRun

MISTAKES = {
    "Dockerfile": ("Dockerfile", "FROM ${PYTHON_IMAGE} AS base", "FROM python:latest AS base"),
    "shell scripts": ("deploy/entrypoint.sh", '"$folder" 2>', "$folder 2>"),
    "YAML": ("deploy/monitoring/prometheus.yml", "rule_files:", "global: {}\nrule_files:"),
    "Compose: schema": ("deploy/compose.yml", "start_period", "start_perod"),
    "Compose: profiles": ("deploy/compose.yml", "networks: [outside, monitoring]", "networks: [elsewhere]"),
    "Compose: confinement": ("deploy/compose.yml", "networks: [outside, monitoring]", "privileged: true"),
    "HAProxy: configuration": ("deploy/balancer/haproxy.cfg", "hash-balance-factor", "hash-balance-factors"),
    "Prometheus: configuration": ("deploy/monitoring/prometheus.yml", "scrape_interval", "scrap_interval"),
    "Prometheus: rules": ("deploy/monitoring/rules.yml", "min_over_time(", "minimum_over_time("),
    "Prometheus: alerts fire": ("deploy/monitoring/rules.yml", "mean30m > 0.97", "mean30m > 0.99"),
    "Alertmanager: configuration": ("deploy/monitoring/alertmanager.yml", "receiver: nobody", "receiver: somebody"),
    "Grafana: PromQL of the dashboards": ("deploy/monitoring/grafana/dashboards/fusion.json", "rate(", "rate"),
    "Kubernetes: overlays": ("deploy/kubernetes/base/deployment.yml", "readinessProbe", "readinesProbe"),
}
"""For each check a file, a part of it, and what somebody could write there instead."""


def run(check: Callable[[Path], None], root: Path) -> None:
    try:
        check(root)
    except NotRun as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", CHECKS)
def test_the_files_pass(name: str) -> None:
    run(CHECKS[name], ROOT)


@pytest.mark.parametrize("name", CHECKS)
def test_a_mistake_is_found(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    file, right, wrong = MISTAKES[name]
    text = (tmp_path / file).read_text()
    assert right in text
    (tmp_path / file).write_text(text.replace(right, wrong))
    with pytest.raises(Failed):
        run(CHECKS[name], tmp_path)


def test_a_tool_that_cannot_be_had_is_reported_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "CHECKS", {"Alertmanager": CHECKS["Alertmanager: configuration"]})
    for _ in range(2):
        assert command.main() == 0
        assert re.fullmatch(r"not run  Alertmanager: fetching Debian's packages: .+\n", capsys.readouterr().out)


def test_a_failed_check_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_root: Path) -> None:
        raise Failed("line 3: nonsense")

    monkeypatch.setattr(command, "CHECKS", {"this": fail, "that": lambda _root: None})
    assert command.main() == 1
    assert re.fullmatch(r"FAILED   this\nline 3: nonsense\nok       that \(0\.0 s\)\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up == 0", {"up"}),
        ('sum by (le, job) (rate(vllm:x_bucket{a="b c", d=~"e"}[5m])) > 0.5', {"vllm:x_bucket"}),
        ("a:b:c > 0 and on (job, instance) time() - fused_d > 60", {"a:b:c", "fused_d"}),
        ("x / ignoring (s) group_left () sum (y offset 5m)", {"x", "y"}),
    ],
)
def test_metrics_are_found_in_expressions(expression: str, names: set[str]) -> None:
    assert metric_names(expression) == names


def test_no_expression_is_without_a_metric() -> None:
    found = dict(expressions(ROOT))
    assert len(found) > 50
    assert [where for where, expression in found.items() if not metric_names(expression)] == []
