"""The rendered overlays: what a cluster would be told."""

import re
from functools import cache
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import yaml

from deploy.checks.checks import KUBERNETES_OVERLAYS, render
from deploy.checks.promql import ADAPTER_RULES
from deploy.checks.tools import ROOT, NotRun
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.server.cli import parse_command

BALANCER = (ROOT / "deploy" / "balancer" / "haproxy.cfg").read_text()


@cache
def everything(overlay: str) -> dict[tuple[str, str], dict[str, Any]]:
    """An overlay's manifests by kind and name."""
    try:
        text = render(ROOT, overlay)
    except NotRun as reason:
        pytest.skip(str(reason))
    return {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(text)}


def rendered(overlay: str, about: str = "ultrafuser") -> dict[str, dict[str, Any]]:
    """Those of this name by kind, and those that are the only ones of their kind."""
    manifests = everything(overlay)
    kinds = [kind for kind, _ in manifests]
    return {kind: item for (kind, name), item in manifests.items() if name == about or kinds.count(kind) == 1}


@pytest.fixture(params=KUBERNETES_OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return rendered(request.param)


def pod_of(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the servers, by whichever kind starts them."""
    pod: dict[str, Any] = template_of(manifests)["spec"]
    return pod


def template_of(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    for kind in ("LeaderWorkerSet", "StatefulSet", "Deployment"):
        if kind in manifests:
            spec = manifests[kind]["spec"]
            template: dict[str, Any] = spec.get("template") or spec["leaderWorkerTemplate"]["workerTemplate"]
            return template
    raise AssertionError("nothing starts a server")


def asked(probe: dict[str, Any]) -> str:
    """The path that a probe of a server asks for."""
    command = probe.get("exec", {}).get("command", [""])
    return str(probe["httpGet"]["path"] if "httpGet" in probe else command[-1].split()[-1])


def test_the_probes_ask_what_they_are_for(manifests: dict[str, dict[str, Any]]) -> None:
    (server,) = pod_of(manifests)["containers"]
    paths = {kind: asked(server[f"{kind}Probe"]) for kind in ("startup", "readiness", "liveness")}
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


@pytest.mark.parametrize("overlay", KUBERNETES_OVERLAYS)
def test_services_policies_and_budgets_select_the_servers_pods(overlay: str) -> None:
    manifests = rendered(overlay)
    labels = template_of(manifests)["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/name": "ultrafuser"}
    first_node = {"leaderworkerset.sigs.k8s.io/worker-index": "0"} if overlay == "nodes" else {}
    service = rendered(overlay, "ultrafuser-replicas" if overlay == "replicas" else "ultrafuser")["Service"]
    assert service["spec"]["selector"] == labels | first_node
    assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    if overlay != "nodes":
        assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert {item["metadata"]["namespace"] for item in everything(overlay).values()} == {"ultrafuser"}


@pytest.mark.parametrize("overlay", KUBERNETES_OVERLAYS)
def test_clients_need_the_documented_label_and_no_other(overlay: str) -> None:
    """The base's own labels were once added to those that a client must have: every client was locked out."""
    manifests = rendered(overlay)
    if overlay == "replicas":  # where they come to the balancers, and nobody but these to the servers
        (from_balancers, _), *_ = [rule["from"] for rule in manifests["NetworkPolicy"]["spec"]["ingress"]]
        label = {"key": "app.kubernetes.io/name", "operator": "In", "values": ["ultrafuser-balancer"]}
        assert from_balancers == {"podSelector": {"matchExpressions": [label]}}
        manifests = rendered(overlay, "ultrafuser-balancer")
        rules = manifests["NetworkPolicy"]["spec"]["ingress"]
        rule = {"from": [peer for each in rules for peer in each["from"]]}
    else:
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
    scaler = manifests["HorizontalPodAutoscaler"]["spec"]
    (metric,) = scaler["metrics"]
    (rule,) = yaml.safe_load((ROOT / ADAPTER_RULES).read_text())
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert scaler["scaleTargetRef"]["kind"] == "StatefulSet"
    assert "replicas" not in manifests["StatefulSet"]["spec"]
    assert manifests["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert pod_of(manifests)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_balancers_know_the_replicas_by_the_names_that_their_pods_have() -> None:
    servers, balancers = rendered("replicas"), rendered("replicas", "ultrafuser-balancer")
    pods, names = servers["StatefulSet"]["spec"], everything("replicas")["Service", "ultrafuser-replicas"]
    (balancer,) = balancers["Deployment"]["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in balancer["env"]}
    assert variables["REPLICA_NAME"] == f"{servers['StatefulSet']['metadata']['name']}-"
    assert variables["REPLICA_DOMAIN"] == f".{pods['serviceName']}.ultrafuser.svc.cluster.local"
    assert names["metadata"]["name"] == pods["serviceName"]
    assert names["spec"]["clusterIP"] == "None"
    assert names["spec"]["publishNotReadyAddresses"] is True
    most = servers["HorizontalPodAutoscaler"]["spec"]["maxReplicas"]
    places = re.findall(r"^  server replica-(\d+) .* check$", BALANCER, re.MULTILINE)
    assert {str(number) for number in range(pods["ordinals"]["start"], pods["ordinals"]["start"] + most)} <= set(places)


def test_balancers_run_the_shipped_files_where_clients_look_for_a_server() -> None:
    manifests, balancers = everything("replicas"), rendered("replicas", "ultrafuser-balancer")
    pod = balancers["Deployment"]["spec"]["template"]["spec"]
    (files,) = [volume["configMap"]["name"] for volume in pod["volumes"]]
    assert manifests["ConfigMap", files]["data"]["haproxy.cfg"] == BALANCER
    assert set(manifests["ConfigMap", files]["data"]) == {"haproxy.cfg", "conversation.lua"}
    (balancer,) = pod["containers"]
    assert f"HAPROXY_IMAGE={balancer['image']}" in (ROOT / "deploy" / "images.lock").read_text()
    labels = balancers["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Service", "ultrafuser"]["spec"]["selector"] == labels
    assert balancers["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    stop_seconds = int(re.findall(r"hard-stop-after (\d+)s", BALANCER)[0])
    assert pod["terminationGracePeriodSeconds"] > stop_seconds + int(
        balancer["lifecycle"]["preStop"]["exec"]["command"][1]
    )


def test_nodes_of_one_engine_are_told_who_they_are_by_flags_that_exist() -> None:
    manifests = rendered("nodes")
    (server,) = pod_of(manifests)["containers"]
    size = manifests["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["size"]
    values = {"LWS_GROUP_SIZE": size, "LWS_WORKER_INDEX": 1, "LWS_LEADER_ADDRESS": "ultrafuser-0.ultrafuser.ultrafuser"}
    arguments = [re.sub(r"\$\((\w+)\)", lambda name: str(values[name[1]]), each) for each in server["args"]]
    command = parse_command(["serve", *arguments], {})
    assert (command.settings.nnodes, command.settings.node_rank) == (2, 1)
    assert command.settings.master_addr == values["LWS_LEADER_ADDRESS"]
    gpus = int(server["resources"]["limits"]["nvidia.com/gpu"])
    assert command.engine_options["tensor_parallel_size"] == size * gpus
    named = {source["configMapRef"]["name"] for source in server["envFrom"]}
    assert named <= {name for kind, name in everything("nodes") if kind == "ConfigMap"}


def test_nodes_of_one_engine_reach_each_other_at_any_port_and_nobody_else_does() -> None:
    policy = everything("nodes")["NetworkPolicy", "ultrafuser-nodes"]["spec"]
    peers = [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "ultrafuser"}}}]
    assert (policy["ingress"], policy["egress"]) == ([{"from": peers}], [{"to": peers}])


def test_the_overlays_fusion_is_the_shipped_one_but_for_the_gates_place() -> None:
    file = ROOT / "deploy" / "kubernetes" / "overlays" / "gpu" / "fusion.yaml"
    own, shipped = (yaml.safe_load(path.read_text()) for path in (file, ROOT / "gating/presets/qwen2.5-7b.yaml"))
    assert own | {"gate": shipped["gate"]} == shipped
    assert load_fusion(str(file)).gate == "/models/fusion/gate.safetensors"
