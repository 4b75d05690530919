"""`ultrafuser batch` with a real engine: killed, gone on with in a terminal, and in the end what the server says."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.e2e.conftest import NO_SPACES
from tests.e2e.process import ServerProcess, clean_environment, wait_for
from tests.e2e.terminal import Terminal

NUM_CHATS = 40
MAX_TOKENS = 60


def requests() -> list[dict[str, Any]]:
    """Greedy ones for every route that generates, calls and a schema among them, and some that must fail."""
    greedy = {"model": "tiny", "temperature": 0, "ignore_eos": True}

    def chat(text: str, **changes: Any) -> dict[str, Any]:
        return {**greedy, "messages": [{"role": "user", "content": text}], "max_tokens": MAX_TOKENS, **changes}

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    chats = {f"chat-{index}": chat(f"question {index}", gate_weights=True) for index in range(NUM_CHATS)}
    asked = {
        "/v1/chat/completions": {
            **chats,
            "schema": chat("json", ignore_eos=False, response_format={"type": "json_object"}),
            "call": chat("look", ignore_eos=False, tools=[tool], tool_choice="required"),
            "refused": chat("hot", temperature=9),
            "streamed": chat("stream", stream=True),
        },
        "/v1/completions": {"several": {**greedy, "prompt": ["the", "a"], "max_tokens": 8, "logprobs": 2}},
        "/v1/responses": {"response": {"model": "tiny", "input": "the", "temperature": 0, "max_output_tokens": 16}},
        "/v1/messages": {"message": {k: v for k, v in chat("hello").items() if k != "ignore_eos"}},
        "/v1/embeddings": {"elsewhere": {"input": "x"}},
    }
    return [
        {"custom_id": name, "method": "POST", "url": url, "body": body}
        for url, bodies in asked.items()
        for name, body in bodies.items()
    ]


def lines_of(path: Path) -> list[str]:
    """Whole lines of a file that may not be there yet."""
    return path.read_text().splitlines(keepends=True) if path.exists() else []


CHANGING = {"id", "created", "created_at", "completed_at", "call_id", "usage", "drafted"}
"""What differs each time the same is asked."""


def check_alike(own: Any, other: Any, place: str) -> None:
    """Texts, reasons and all else equal; numbers up to the order in which a batch adds up."""
    if isinstance(own, dict) and isinstance(other, dict):
        assert own.keys() == other.keys(), place
        for name in own.keys() - CHANGING:
            check_alike(own[name], other[name], f"{place}.{name}")
    elif isinstance(own, list) and isinstance(other, list):
        assert len(own) == len(other), place
        for index, pair in enumerate(zip(own, other, strict=True)):
            check_alike(*pair, f"{place}.{index}")
    else:
        assert own == (pytest.approx(other, abs=1e-3) if isinstance(other, float) else other), place


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_batch_goes_on_and_says_what_the_server_says(
    tiny_fusion: Path, server: ServerProcess, tmp_path: Path
) -> None:
    source, output, log = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "log"
    asked = requests()
    source.write_text("".join(f"{json.dumps(row)}\n" for row in asked) + "no JSON\n")
    command = [sys.executable, "-m", "ultrafuser.server", "batch", str(source), str(output)]
    command += ["--fusion", str(tiny_fusion), "--tool-call-parser", "hermes", "--max-num-queued-reqs", "3"]
    command += ["--structured-outputs-config", NO_SPACES]

    with log.open("w") as stream:
        first = subprocess.Popen(command, stdout=stream, stderr=stream, env=clean_environment(), process_group=0)

    def has_answers() -> bool:
        assert first.poll() is None, log.read_text()
        return len(lines_of(output)) >= 10

    wait_for(has_answers, "ten answers", 240)
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = [line for line in lines_of(output) if line.endswith("\n") and '"status_code": 200' in line]
    assert 5 < len(kept) < NUM_CHATS
    assert "batch: 49 of 49 requests to go" in log.read_text()
    wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in family), "its engine has ended", 60)

    with Terminal([*command, "--resume"]) as terminal:
        assert terminal.wait_until_it_ends() == 1
        shown = terminal.shown
    assert re.search(r"batch: +\d+%\|.*\| \d+/49 \[\d\d:\d\d<\d\d:\d\d, .*request/?s?.*\]", shown), shown
    assert "45 answered, 4 failed; the same command with --resume tries them again" in shown
    assert "Traceback" not in shown
    assert "".join(lines_of(output)).startswith("".join(kept))

    rows = {row["custom_id"]: row for row in map(json.loads, lines_of(output))}
    assert len(rows) == len(lines_of(output)) == len(asked) + 1
    codes = {name: row["error"]["code"] for name, row in rows.items() if row["error"]}
    assert codes == {None: "invalid_json_line", "streamed": "invalid_body", "elsewhere": "invalid_url"}
    for request in asked:
        if request["custom_id"] not in codes:
            own = rows[request["custom_id"]]["response"]
            response = httpx.post(f"{server.url}{request['url']}", json=request["body"], timeout=120)
            assert own["status_code"] == response.status_code == (400 if request["custom_id"] == "refused" else 200)
            check_alike(own["body"], response.json(), request["custom_id"])
