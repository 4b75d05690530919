"""The shipped jobs of Prometheus find all replicas, and the balancer, by the names that Compose gives them."""

import os
import subprocess
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import pytest
import yaml

from deploy.checks.tools import ROOT, NotRun, find_debian_tool
from tests.balancer import free_port
from tests.deploy.replicas import Names
from tests.e2e.process import wait_for

OWN_NAMES = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"']
"""Runs a command that asks the name server of another file than this machine's."""

NAME_SERVER = "127.0.0.153"  # 53 is systemd's


def targets(url: str) -> dict[str, set[str]]:
    """Addresses by job."""
    try:
        found: list[dict[str, Any]] = httpx.get(f"{url}/api/v1/targets").json()["data"]["activeTargets"]
    except httpx.TransportError:
        return {}
    jobs = {target["labels"]["job"] for target in found}
    return {job: {each["labels"]["instance"] for each in found if each["labels"]["job"] == job} for job in jobs}


def may_choose_its_names() -> bool:
    if os.geteuid() != 0 or which("unshare") is None:
        return False
    return subprocess.run([*OWN_NAMES, "/etc/resolv.conf", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not may_choose_its_names(), reason="needs root, to ask a name server of its own")
def test_one_job_finds_every_replica(tmp_path: Path) -> None:
    try:
        program = find_debian_tool("prometheus")
    except NotRun as reason:
        pytest.skip(str(reason))
    config = yaml.safe_load((ROOT / "deploy" / "monitoring" / "prometheus.yml").read_text())
    for job in config["scrape_configs"]:
        for discovery in job.get("dns_sd_configs", []):
            discovery["refresh_interval"] = "1s"
    del config["alerting"], config["rule_files"]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "resolv.conf").write_text(f"nameserver {NAME_SERVER}\nsearch example.org\noptions ndots:0\n")
    address = f"127.0.0.1:{free_port()}"
    options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    known = {"server": ["127.0.0.11", "127.0.0.12"], "balancer": ["127.0.0.13"]}
    with Names(known, (NAME_SERVER, 53)) as names, (tmp_path / "log").open("w") as log:
        command = [*OWN_NAMES, str(tmp_path / "resolv.conf"), str(program), *options]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        try:
            both = {"127.0.0.11:8000", "127.0.0.12:8000"}
            wait_for(lambda: targets(f"http://{address}").get("ultrafuser") == both, "both are found")
            assert targets(f"http://{address}")["balancer"] == {"127.0.0.13:8404"}
            names.addresses["server"].append("127.0.0.14")
            third = both | {"127.0.0.14:8000"}
            wait_for(lambda: targets(f"http://{address}").get("ultrafuser") == third, "so is a third one")
        finally:
            process.terminate()
            process.wait(20)
