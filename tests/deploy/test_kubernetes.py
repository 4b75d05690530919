"""The rendered overlays: what a cluster would be told."""

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import yaml

from deploy.checks.checks import KUBERNETES_OVERLAYS, render
from deploy.checks.promql import ADAPTER_RULES
from deploy.checks.tools import ROOT, NotRun
from ultrafuser.gating.model.fusion import load_fusion


def rendered(overlay: str) -> dict[str, dict[str, Any]]:
    """An overlay's manifests by kind."""
    try:
        text = render(ROOT, overlay)
    except NotRun as reason:
        pytest.skip(str(reason))
    return {item["kind"]: item for item in yaml.safe_load_all(text)}


@pytest.fixture(params=KUBERNETES_OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return rendered(request.param)


def pod_of(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    pod: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return pod


def test_the_probes_ask_what_they_are_for(manifests: dict[str, dict[str, Any]]) -> None:
    (server,) = pod_of(manifests)["containers"]
    paths = {kind: server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 900
    patience = {
        kind: server[f"{kind}Probe"]["periodSeconds"] * server[f"{kind}Probe"]["failureThreshold"]
        for kind in ("readiness", "liveness")
    }
    assert patience["readiness"] < patience["liveness"]


def test_a_pod_may_do_nothing_but_serve(manifests: dict[str, dict[str, Any]]) -> None:
    pod = pod_of(manifests)
    (server,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert server["resources"]["limits"]["memory"]


def test_every_folder_that_is_written_to_is_a_volume(manifests: dict[str, dict[str, Any]]) -> None:
    pod = pod_of(manifests)
    volumes = {volume["name"]: set(volume) - {"name"} for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["/models"] == {"persistentVolumeClaim"}
    assert mounts["/cache"] == mounts["/tmp"] == mounts["/dev/shm"] == {"emptyDir"}


def test_services_policies_and_budgets_select_the_servers_pods(manifests: dict[str, dict[str, Any]]) -> None:
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert {item["metadata"]["namespace"] for item in manifests.values()} == {"ultrafuser"}


def test_clients_need_the_documented_label_and_no_other(manifests: dict[str, dict[str, Any]]) -> None:
    """The base's own labels were once added to those that a client must have: every client was locked out."""
    (rule,) = manifests["NetworkPolicy"]["spec"]["ingress"]
    clients, monitoring = rule["from"]
    label = {"key": "ultrafuser/client", "operator": "In", "values": ["true"]}
    assert clients == {"namespaceSelector": {}, "podSelector": {"matchExpressions": [label]}}
    assert monitoring == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}


def reaches(rules: list[dict[str, Any]], address: str, port: int) -> bool:
    """Whether egress rules let TCP through to an address outside of the cluster, or on a node."""
    ip = ip_address(address)
    everywhere: list[dict[str, Any]] = [{"ipBlock": {"cidr": cidr, "except": []}} for cidr in ("0.0.0.0/0", "::/0")]
    blocks = [
        peer["ipBlock"]
        for rule in rules
        if {"port": port, "protocol": "TCP"} in rule["ports"]
        for peer in rule.get("to", everywhere)
    ]
    return any(
        ip in ip_network(block["cidr"]) and not any(ip in ip_network(hole) for hole in block["except"])
        for block in blocks
    )


def test_a_server_reaches_names_the_hub_and_a_collector_and_no_credentials(
    manifests: dict[str, dict[str, Any]],
) -> None:
    """Name servers on the node were asked in vain, and so was everything that has an address of IPv6 alone."""
    egress = manifests["NetworkPolicy"]["spec"]["egress"]
    outside = [rule for rule in egress if not any("namespaceSelector" in peer for peer in rule.get("to", []))]
    assert reaches(outside, "169.254.20.10", 53)
    assert reaches(outside, "203.0.113.7", 443)
    assert reaches(outside, "2001:db8::7", 443)
    assert [ip for ip in ("169.254.169.254", "fd00:ec2::254", "fe80::1") if reaches(outside, ip, 443)] == []
    assert not reaches(outside, "203.0.113.7", 8080)
    (collector,) = [rule for rule in egress if rule not in outside]
    assert collector["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert [port["port"] for port in collector["ports"]] == [4317, 4318]


def test_a_server_on_cpus_has_a_limit_to_count_its_threads_by() -> None:
    """Without one vLLM started a thread for each core of the node."""
    (server,) = pod_of(rendered("cpu"))["containers"]
    assert server["resources"]["limits"]["cpu"] == server["resources"]["requests"]["cpu"]


def test_replicas_follow_the_queue_and_share_the_models() -> None:
    manifests = rendered("replicas")
    (metric,) = manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (rule,) = yaml.safe_load((ROOT / ADAPTER_RULES).read_text())
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert "replicas" not in manifests["Deployment"]["spec"]
    assert manifests["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert pod_of(manifests)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_overlays_fusion_is_the_shipped_one_but_for_the_gates_place() -> None:
    file = ROOT / "deploy" / "kubernetes" / "overlays" / "gpu" / "fusion.yaml"
    own, shipped = (yaml.safe_load(path.read_text()) for path in (file, ROOT / "gating/presets/qwen2.5-7b.yaml"))
    assert own | {"gate": shipped["gate"]} == shipped
    assert load_fusion(str(file)).gate == "/models/fusion/gate.safetensors"
