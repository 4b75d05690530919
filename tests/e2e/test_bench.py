"""`vllm bench serve` runs against the server as against vLLM's own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import MODEL
from tests.e2e.process import ServerProcess, clean_environment

# The command itself does not start with vLLM's CPU package, whose distribution has another name; its main does.
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "endpoint"), [("openai-chat", "/v1/chat/completions"), ("openai", "/v1/completions")]
)
def test_every_request_of_the_benchmark_succeeds(
    server: ServerProcess, tiny_fusion: Path, tmp_path: Path, backend: str, endpoint: str
) -> None:
    options = {
        "backend": backend,
        "endpoint": endpoint,
        "base-url": server.url,
        "model": MODEL,
        "tokenizer": str(tiny_fusion.parent / "text"),
        "dataset-name": "random",
        "random-input-len": "16",
        "random-output-len": "8",
        "num-prompts": "6",
        "max-concurrency": "3",
        "result-dir": str(tmp_path),
        "result-filename": "result.json",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-c", BENCH, *flags, "--save-result"]
    run = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=200)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (6, 0)
    assert result["total_output_tokens"] == 6 * 8
