"""What is checked, and with which tool. Each check takes the root of a working tree: a wrong one can be tried too."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from deploy.checks.promql import expressions
from deploy.checks.tools import call

COMPOSE_PROFILES = ("cpu", "gpu", "replicas", "monitoring", "alerts")
KUBERNETES_OVERLAYS = ("cpu", "gpu", "replicas", "nodes")
KUBERNETES_VERSIONS = ("1.30", "1.37")
"""The oldest release that the manifests are for, and the newest whose schema the tool knows."""

YAMLLINT = "{extends: default, rules: {line-length: {max: 200}, document-start: disable, braces: disable,\
 comments: {min-spaces-from-content: 1}, indentation: {indent-sequences: whatever}, truthy: {check-keys: false}}}"


def check_dockerfile(root: Path) -> None:
    """The Dockerfile against hadolint's rules."""
    call("hadolint", "--failure-threshold", "info", root / "Dockerfile")


def check_shell(root: Path) -> None:
    """Every shell script against shellcheck."""
    stand_ins = sorted((root / "tests" / "container").glob("*.sh"))
    scripts = [
        *sorted((root / "deploy").glob("*.sh")),
        *stand_ins,
        root / "requirements" / "compile",
        root / ".ci" / "run",
    ]
    call("shellcheck", *scripts)


def check_yaml(root: Path) -> None:
    """Every YAML file: well-formed, no key twice."""
    call("yamllint", "--strict", "-d", YAMLLINT, root / "deploy")


def check_compose_schema(root: Path) -> None:
    """compose.yml against the schema of the Compose specification."""
    call("check-jsonschema", "--builtin-schema", "vendor.compose-spec", root / "deploy" / "compose.yml")


def check_compose_profiles(root: Path) -> None:
    """Every profile as Compose resolves it, with the examples' variables and the lock's images."""
    deploy = root / "deploy"
    files: list[str | Path] = [
        "-f",
        deploy / "compose.yml",
        "--env-file",
        deploy / "images.lock",
        "--env-file",
        deploy / ".env.example",
    ]
    for profile in COMPOSE_PROFILES:
        call("docker-compose", *files, "--profile", profile, "config", "--quiet")


def check_compose_security(root: Path) -> None:
    """compose.yml against compose-lint's rules of confinement; images get their digests at a release."""
    call("compose-lint", root / "deploy" / "compose.yml")


def check_balancer(root: Path) -> None:
    """haproxy.cfg and its Lua as HAProxy reads them, without a warning."""
    folder = root / "deploy" / "balancer"
    call("haproxy", "-c", "-dW", "-f", folder / "haproxy.cfg", BALANCER_FOLDER=str(folder))


def check_prometheus_config(root: Path) -> None:
    """prometheus.yml as Prometheus reads it."""
    call("promtool", "check", "config", "--syntax-only", root / "deploy" / "monitoring" / "prometheus.yml")


def check_rules(root: Path) -> None:
    """Recording and alert rules as Prometheus reads them."""
    call("promtool", "check", "rules", "--lint-fatal", root / "deploy" / "monitoring" / "rules.yml")


def check_alerts_fire(root: Path) -> None:
    """Every alert over made-up series: it fires when it should, and not before."""
    call("promtool", "test", "rules", root / "deploy" / "monitoring" / "rules_test.yml")


def check_alertmanager_config(root: Path) -> None:
    """alertmanager.yml as Alertmanager reads it."""
    call("amtool", "check-config", root / "deploy" / "monitoring" / "alertmanager.yml")


def check_dashboards(root: Path) -> None:
    """The PromQL of every dashboard panel, as rules that Prometheus reads."""
    rules = [{"record": f"panel:{number}", "expr": expr} for number, (_, expr) in enumerate(expressions(root))]
    with tempfile.NamedTemporaryFile("w", suffix=".yml", encoding="utf-8") as file:
        yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}, file)
        file.flush()
        call("promtool", "check", "rules", "--lint=none", file.name)


def check_kubernetes(root: Path) -> None:
    """Every overlay, rendered, against the schemas of Kubernetes' resources; an unknown field is an error.

    Of a LeaderWorkerSet, which is none of these, the pod is looked at."""
    with tempfile.TemporaryDirectory() as folder:
        for overlay in KUBERNETES_OVERLAYS:
            rendered = Path(folder) / f"{overlay}.yml"
            items = [_built_in(item) for item in yaml.safe_load_all(render(root, overlay))]
            rendered.write_text(yaml.safe_dump_all(items), encoding="utf-8")
            for version in KUBERNETES_VERSIONS:
                call("kubernetes-validate", "--strict", "-k", version, rendered)


def _built_in(item: dict[str, Any]) -> dict[str, Any]:
    if item["kind"] != "LeaderWorkerSet":
        return item
    pod = item["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": pod["spec"]}


def render(root: Path, overlay: str) -> str:
    """An overlay's manifests, as `kubectl apply -k` would send them."""
    return call("kustomize", "build", root / "deploy" / "kubernetes" / "overlays" / overlay)


CHECKS: Mapping[str, Callable[[Path], None]] = {
    "Dockerfile": check_dockerfile,
    "shell scripts": check_shell,
    "YAML": check_yaml,
    "Compose: schema": check_compose_schema,
    "Compose: profiles": check_compose_profiles,
    "Compose: confinement": check_compose_security,
    "HAProxy: configuration": check_balancer,
    "Prometheus: configuration": check_prometheus_config,
    "Prometheus: rules": check_rules,
    "Prometheus: alerts fire": check_alerts_fire,
    "Alertmanager: configuration": check_alertmanager_config,
    "Grafana: PromQL of the dashboards": check_dashboards,
    "Kubernetes: overlays": check_kubernetes,
}
