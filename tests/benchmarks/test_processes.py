"""Benchmarks as programs: nothing but the result on standard output, and no process left behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.environment import REPOSITORY
from benchmarks.result import newest_result, read_result
from benchmarks.servers import ServerFailed, ServerProcess, free_port, running

# A server that answers 200, with a child of its own that would outlive it; its process id is in the answer.
SERVER = """
import argparse, http.server, subprocess, sys
parser = argparse.ArgumentParser()
parser.add_argument("--host"); parser.add_argument("--port", type=int)
a = parser.parse_args()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(child.pid).encode())
http.server.HTTPServer((a.host, a.port), Handler).serve_forever()
"""

BENCHMARK = """
import os, signal
from benchmarks.command import run_benchmark
from benchmarks.measure import Comparison, Measured
from benchmarks.result import Question
def measure(options):
    print("noise"); os.system("echo noise of a child")
    if os.environ.get("BREAK") == "at once": raise RuntimeError("broken")
    side = Measured(value=1.0)
    yield Comparison(case="batch 1", unit="ms", fused=side, baseline=side, ratio=1.0)
    if os.environ.get("BREAK") == "later": raise RuntimeError("broken")
    if os.environ.get("BREAK") == "by the clock": os.kill(os.getpid(), signal.SIGTERM)
run_benchmark(Question(name="fake", text="?", fused="f", baseline="b", ratio="f / b", method="-"), measure)
"""


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return status != "Z"


def run(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", BENCHMARK, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env={**os.environ, **environ}
    )


def test_a_server_and_its_children_end_with_the_context() -> None:
    server = ServerProcess(["-c", SERVER], "/")
    with running([server]):
        child = int(httpx.get(server.url, trust_env=False).text)
        assert is_alive(child)
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url, trust_env=False)


def test_a_server_that_dies_says_why_and_takes_the_others_with_it() -> None:
    healthy = ServerProcess(["-c", SERVER], "/")
    broken = ServerProcess(["-c", "import sys; sys.exit('no such model')"], "/")
    with pytest.raises(ServerFailed, match="no such model"), running([healthy, broken]):
        pass
    with pytest.raises(httpx.ConnectError):
        httpx.get(healthy.url, trust_env=False)


def test_ports_are_free_and_differ() -> None:
    ports = [free_port() for _ in range(5)]
    assert all(port > 1023 for port in ports)


def test_standard_output_holds_the_result_and_nothing_else(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    summary = json.loads(line)
    assert summary["name"] == "fake"
    assert summary["ok"] is True
    assert Path(summary["file"]).parent == tmp_path
    assert "noise of a child" in done.stderr


def test_a_quick_run_files_nothing() -> None:
    assert json.loads(run("--quick").stdout)["file"] is None


def test_an_error_is_no_result() -> None:
    done = run("--quick", BREAK="at once")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "broken" in done.stderr


@pytest.mark.parametrize(
    ("how", "status", "why"), [("later", 1, "RuntimeError: broken"), ("by the clock", 143, "SystemExit: 143")]
)
def test_what_was_measured_before_an_error_is_filed(tmp_path: Path, how: str, status: int, why: str) -> None:
    """Minutes of a lent device were lost with the figures of all parts before the one that failed."""
    done = run("--results", str(tmp_path), BREAK=how)
    assert (done.returncode, done.stdout) == (status, "")
    (file,) = tmp_path.glob("*.json")
    assert str(file) in done.stderr
    result = read_result(file)
    assert [item.case for item in result.comparisons] == ["batch 1"]
    assert result.ended_by == why
    assert result.summary["ok"] is None


def test_what_an_error_has_ended_does_not_replace_the_days_whole_result(tmp_path: Path) -> None:
    whole = Path(json.loads(run("--results", str(tmp_path)).stdout)["file"])
    content = whole.read_bytes()
    assert run("--results", str(tmp_path), BREAK="later").returncode == 1
    assert whole.read_bytes() == content
    assert read_result(tmp_path / f"{whole.stem}-ended.json").ended_by == "RuntimeError: broken"
    assert newest_result(tmp_path, "fake") == whole
