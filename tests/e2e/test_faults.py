"""Faults, really injected: a stopped, killed or failing engine, a full disk, files that are not what they say."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.e2e.clients import Listener
from tests.e2e.process import ServerProcess, clean_environment, wait_for
from tests.fakes import write_tiny_fusion

pytestmark = pytest.mark.slow

STALL_SECONDS = 1.0
REQUEST_SECONDS = 8.0
EXIT_SECONDS = 15.0
START_FAILS_SECONDS = 30.0
OPTIONS = ["--stall-timeout", str(STALL_SECONDS), "--keep-alive-interval", "0.5", "--request-timeout"]

RAISE_ON_DEMAND = '''
"""Makes one specialist's forward pass raise as soon as a file exists."""

import importlib.util
import os
import sys

MODULE = "vllm.model_executor.models.llama"


class Finder:
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            forward = module.LlamaForCausalLM.forward

            def fail_on_demand(self, *args, **kwargs):
                if self.config.num_hidden_layers == 12 and os.path.exists(os.environ["FAULT_FILE"]):
                    raise RuntimeError("an injected fault")
                return forward(self, *args, **kwargs)

            module.LlamaForCausalLM.forward = fail_on_demand

        spec.loader.exec_module = execute_and_patch
        return spec


sys.meta_path.insert(0, Finder())
'''

START_SEVERAL = """
import json, resource, sys, time
from ultrafuser.server.__main__ import main

for argv, max_file_bytes in json.loads(sys.argv[1]):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes or hard, hard))
    start = time.monotonic()
    status = main(argv)
    print("== ended", status, time.monotonic() - start, file=sys.stderr, flush=True)
"""


def ask(url: str, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 8, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server's log is, and what is done to it."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def server(tiny_fusion: Path, folder: Path) -> Iterator[ServerProcess]:
    """A server that notices stalls quickly, started where another one has left its metrics behind."""
    for name in ("left", "site"):
        (folder / name).mkdir()
    (folder / "left" / "counter_1.db").write_bytes(b"\xff" * 4096)
    (folder / "site" / "sitecustomize.py").write_text(RAISE_ON_DEMAND)
    environ = {
        "PROMETHEUS_MULTIPROC_DIR": str(folder / "left"),
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
        "FAULT_FILE": str(folder / "fault"),
    }
    server = ServerProcess(tiny_fusion, folder / "log", *OPTIONS, str(REQUEST_SECONDS), environ=environ)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


def test_metrics_that_a_crash_left_behind_are_not_read(server: ServerProcess) -> None:
    assert server.metric("fused_ready") == 1
    assert server.metric("process_resident_memory_bytes") > 0  # missing where several processes share a folder


@pytest.mark.parametrize("name", ["EngineCor", "Worker"])
def test_a_stopped_engine_is_noticed_and_goes_on_where_it_was(server: ServerProcess, name: str) -> None:
    alone = Listener(server.url, max_tokens=100, temperature=0)
    alone.join()
    listener = Listener(server.url, max_tokens=100, temperature=0)
    process = server.child(name)
    process.suspend()
    try:
        stalled = {"status": "the engine has work, but makes no steps"}
        wait_for(lambda: httpx.get(f"{server.url}/ready").json() == stalled, "/ready says so", 5)
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.metric("fused_ready") == 0
    finally:
        process.resume()
    listener.join()
    assert listener.text() == alone.text()
    assert ": keep-alive" in listener.comments
    wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 200, "/ready says that it goes on", 5)


def test_requests_to_a_stopped_engine_end_at_their_deadline(server: ServerProcess) -> None:
    usual = ask(server.url).json()["choices"]
    listener = Listener(server.url, max_tokens=900)
    core = server.child("EngineCor")
    core.suspend()
    try:
        start = time.monotonic()
        answer = ask(server.url)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "request_timeout"
        assert answer.headers["x-should-retry"] == "false"
        assert REQUEST_SECONDS - 1 < time.monotonic() - start < 2 * REQUEST_SECONDS
        assert listener.last_error() == "request_timeout"
        assert httpx.get(f"{server.url}/ready").status_code == 503  # though nothing is left to do
    finally:
        core.resume()
    wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 200, "/ready says that it goes on", 5)
    wait_for(lambda: server.metric("vllm:num_requests_running{") == 0, "the requests have left the engine")
    assert server.metric("vllm:num_requests_waiting{") == 0
    assert server.metric("vllm:kv_cache_usage_perc{") == 0
    assert ask(server.url).json()["choices"] == usual


def check_the_end(server: ServerProcess, break_engine: Callable[[], None], exit_seconds: float = EXIT_SECONDS) -> float:
    """Break the engine while a stream and a request run: both are told, the server ends; after how many seconds
    `/health` said so, infinity if it never did."""
    answers: list[httpx.Response] = []
    whole = threading.Thread(target=lambda: answers.append(ask(server.url, max_tokens=900, ignore_eos=True)))
    whole.start()
    listener = Listener(server.url, max_tokens=900)
    wait_for(lambda: server.metric("vllm:num_requests_running{") == 2, "both run")
    server.children()
    url, health = server.url, set()
    start = time.monotonic()
    break_engine()
    while server.process.poll() is None and time.monotonic() < start + 60:
        with suppress(httpx.HTTPError):
            health.add((int(time.monotonic() - start), httpx.get(f"{url}/health", timeout=5).status_code))
        time.sleep(0.05)
    assert time.monotonic() - start < exit_seconds
    assert server.process.wait(1) == 1
    assert listener.last_error() == "engine_dead"
    whole.join(5)
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (500, "engine_dead")
    assert answers[0].headers["x-should-retry"] == "false"
    wait_for(lambda: not server.survivors(), "its other processes have ended", 10)
    return min((second for second, status in health if status == 503), default=inf)


def test_a_specialist_that_raises_ends_everything_with_an_error(server: ServerProcess, folder: Path) -> None:
    """The last test of this server: an engine of two specialists would be another model."""
    assert check_the_end(server, (folder / "fault").touch) <= 5
    assert "an injected fault" in server.log


def test_a_killed_engine_core_ends_everything_with_an_error(tiny_fusion: Path, tmp_path: Path) -> None:
    server = ServerProcess(tiny_fusion, tmp_path / "log")
    try:
        server.wait_until_ready()
        assert check_the_end(server, server.child("EngineCor").kill) <= 5
    finally:
        server.kill()


def test_a_start_that_must_fail_says_why_in_one_line(tmp_path: Path) -> None:
    """One process tries them all, since each would import vLLM for seconds."""
    fusion = write_tiny_fusion(tmp_path / "good")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases: list[tuple[list[str], int | None, str]] = [
            ([str(fusion), "--port", port], None, f"port {port}: address already in use; end the program"),
            ([with_gate(fusion, "missing", None)], None, r"gate: no such file .*missing\.safetensors"),
            ([with_gate(fusion, "short", lambda whole: whole[: len(whole) // 2])], None, "not a safetensors file"),
            ([with_gate(fusion, "empty", lambda _: b"")], None, "not a safetensors file"),
            ([with_gate(fusion, "pickle", lambda _: b"\x80\x04cos\nsystem\n.")], None, "not a safetensors file"),
            ([with_adapter(fusion), "--cache", str(tmp_path / "cache")], 1 << 16, "cannot be written .*make room in"),
            ([with_adapter(fusion), "--cache", str(fusion)], None, "cannot be written .*make room in"),
            ([str(fusion), "--api-key-file", str(tmp_path)], None, "--api-key-file: cannot read .*: is a directory"),
        ]
        runs = [(["serve", *argv, *([] if "--port" in argv else ["--port", "0"])], limit) for argv, limit, _ in cases]
        output = subprocess.run(
            [sys.executable, "-c", START_SEVERAL, json.dumps(runs)],
            capture_output=True,
            text=True,
            env=clean_environment(),
            timeout=280,
        ).stderr
    parts = re.split(r"== ended (\d+) ([\d.]+)\n", output)
    assert len(parts) == 3 * len(cases) + 1, output
    for index, (_, _, message) in enumerate(cases):
        text, status, seconds = parts[3 * index : 3 * index + 3]
        (line,) = [line for line in text.splitlines() if line.startswith("ultrafuser: ")]
        assert re.search(message, line), line
        assert status == "2", text
        assert float(seconds) < START_FAILS_SECONDS
        assert "Traceback" not in text


def with_gate(fusion: Path, name: str, change: Callable[[bytes], bytes] | None) -> str:
    """A fusion file beside the given one, whose gate's bytes are changed; None: there is no such file."""
    gate = fusion.with_name(f"{name}.safetensors")
    if change is not None:
        gate.write_bytes(change(fusion.with_name("gate.safetensors").read_bytes()))
    return with_key(fusion, name, gate=gate.name)


def with_adapter(fusion: Path) -> str:
    """A fusion file whose first specialist has an adapter to merge."""
    folder = fusion.with_name("adapter")
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(fusion.with_name("text"))
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(folder))
    specialists = yaml.safe_load(fusion.read_text())["specialists"]
    specialists[0]["adapter"] = "./adapter"
    return with_key(fusion, "adapted", specialists=specialists)


def with_key(fusion: Path, name: str, **keys: Any) -> str:
    path = fusion.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(fusion.read_text()) | keys))
    return str(path)


def test_a_signal_in_the_warm_up_ends_the_server_at_once(tiny_fusion: Path, tmp_path: Path) -> None:
    server = ServerProcess(tiny_fusion, tmp_path / "log")
    try:
        server.wait_for_log("[4/4]")
        assert server.end(signal.SIGINT) in (0, 130)
        wait_for(lambda: not server.survivors(), "the engine's processes have ended", 10)
        assert "Traceback" not in server.log
    finally:
        server.kill()
