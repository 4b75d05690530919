"""What watches the server, held to the real one: metrics by name and form, and a real Prometheus that sees a stall."""

import re
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from deploy.checks.promql import FROM_PROMETHEUS, exported_names, expressions, metric_names, recorded_names
from deploy.checks.tools import ROOT, NotRun, call, find_debian_tool
from tests.e2e.conftest import MODEL
from tests.e2e.process import ServerProcess, wait_for

MONITORING = ROOT / "deploy" / "monitoring"
LONG_REQUEST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Go on."}],
    "max_tokens": 900,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture
def scrape(server: ServerProcess, client: openai.OpenAI) -> str:
    """The metrics of a server that has answered a request."""
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=4)
    return httpx.get(f"{server.url}/metrics").text


def test_every_metric_in_rules_and_dashboards_is_exported(scrape: str) -> None:
    known = exported_names(scrape) | recorded_names(ROOT) | FROM_PROMETHEUS
    unknown = {where: names - known for where, expression in expressions(ROOT) if (names := metric_names(expression))}
    assert unknown
    assert {where: names for where, names in unknown.items() if names} == {}


def test_our_metrics_are_written_as_prometheus_recommends(scrape: str) -> None:
    own = [line for line in scrape.splitlines() if re.match(r"(# \w+ )?fused_", line)]
    assert own
    try:
        call("promtool", "check", "metrics", text="\n".join(own) + "\n")
    except NotRun as reason:
        pytest.skip(str(reason))


class Prometheus:
    """A real Prometheus in a folder of its own, that scrapes one server."""

    def __init__(self, program: Path, folder: Path, target: str) -> None:
        self._write_configuration(folder, target)
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._url = f"http://{address}"
        self._log = folder / "log"
        options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen([program, *options], cwd=folder, stdout=log, stderr=log)

    def _write_configuration(self, folder: Path, target: str) -> None:
        """The shipped files; only intervals, the target and the stall alert's patience are changed."""
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        job = config["scrape_configs"][0]
        del job["dns_sd_configs"], config["alerting"], config["scrape_configs"][1:]
        job["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        rules = yaml.safe_load((MONITORING / "rules.yml").read_text())
        (stalled,) = [rule for group in rules["groups"] for rule in group["rules"] if is_stall_alert(rule)]
        assert stalled["expr"].endswith("> 60")
        stalled |= {"expr": stalled["expr"].removesuffix("60") + "2", "for": "1s"}
        (folder / "rules.yml").write_text(yaml.safe_dump(rules))

    def ask(self, path: str, **query: str) -> Any:
        """Data of an API call; None while it does not listen."""
        assert self._process.poll() is None, self._log.read_text()
        try:
            return httpx.get(f"{self._url}/api/v1/{path}", params=query).raise_for_status().json()["data"]
        except httpx.HTTPError:
            return None

    def is_up(self) -> bool:
        """Whether it has scraped the server."""
        data = self.ask("query", query='up{job="ultrafuser"} == 1')
        return bool(data and data["result"])

    def firing(self) -> dict[str, str]:
        """Summaries of the alerts that fire now, by name."""
        alerts = self.ask("alerts")["alerts"]
        return {
            alert["labels"]["alertname"]: alert["annotations"]["summary"]
            for alert in alerts
            if alert["state"] == "firing"
        }

    def end(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """A process that makes no progress for a while, and goes on whatever happens."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def is_stall_alert(rule: dict[str, Any]) -> bool:
    return rule.get("alert") == "FusedEngineStalled"


@pytest.fixture
def prometheus(server: ServerProcess, tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the shared server."""
    try:
        program = find_debian_tool("prometheus")
    except NotRun as reason:
        pytest.skip(str(reason))
    prometheus = Prometheus(program, tmp_path, server.url.removeprefix("http://"))
    try:
        wait_for(prometheus.is_up, "Prometheus has scraped the server")
        yield prometheus
    finally:
        prometheus.end()


@pytest.mark.slow
def test_prometheus_sees_an_engine_hang_in_its_first_step(server: ServerProcess, prometheus: Prometheus) -> None:
    """vLLM's gauges show a request only once a step has ended: the alert was blind here."""
    (core,) = [child for child in server.children() if "EngineCor" in child.name()]
    body = LONG_REQUEST | {"max_tokens": 4, "stream": False}
    with ThreadPoolExecutor() as pool:
        with stopped(core):
            answer = pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=body, timeout=60)
            wait_for(lambda: "FusedEngineStalled" in prometheus.firing(), "the alert fires")
            assert server.metric("vllm:num_requests_running{") == 0
        assert answer.result().status_code == 200
    wait_for(lambda: prometheus.firing() == {}, "the alert is resolved")


@pytest.mark.slow
def test_prometheus_sees_an_engine_stall_and_go_on(server: ServerProcess, prometheus: Prometheus) -> None:
    (core,) = [child for child in server.children() if "EngineCor" in child.name()]
    assert prometheus.firing() == {}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=LONG_REQUEST, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        with stopped(core):
            wait_for(lambda: "FusedEngineStalled" in prometheus.firing(), "the alert fires")
            summary = prometheus.firing()["FusedEngineStalled"]
        wait_for(lambda: prometheus.firing() == {}, "the alert is resolved")
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert re.fullmatch(r"The engine of 127\.0\.0\.1:\d+ has made no step for a minute; requests in it: 1\.", summary)
