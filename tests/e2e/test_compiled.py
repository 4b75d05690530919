"""A server with compiled models, vLLM's default: it starts, and its tokens are the reference's.

A process of its own: compiling changes settings of the process that other engines in it would run under.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.process import ServerProcess
from tests.fakes import write_tiny_fusion
from tests.reference import answer
from ultrafuser.gating.model.fusion import load_fusion

pytestmark = pytest.mark.long

MESSAGES = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    folder = tmp_path_factory.mktemp("compiled")
    fusion = write_tiny_fusion(folder / "fusion", engine={"enforce_eager": False})
    # A cache of its own: what another run has compiled would not be compiled here.
    drafts = ("--speculation", '{"min_tokens": 2}')
    server = ServerProcess(fusion, folder / "log", *drafts, environ={"VLLM_CACHE_ROOT": str(folder / "cache")})
    try:
        server.wait_until_ready()
        yield server, fusion
    finally:
        server.kill()


def test_the_greedy_response_is_the_references(compiled: tuple[ServerProcess, Path]) -> None:
    server, fusion = compiled
    expected, _ = answer(load_fusion(fusion), MESSAGES, max_new_tokens=48)
    assert expected.top2_gap.min() > 1e-3
    body: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 48, "ignore_eos": True}
    body |= {"return_token_ids": True, "drafted": True}
    (choice,) = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"]
    assert choice["token_ids"] == expected.token_ids
    assert choice["drafted"]["mean"] > 0, "compiled specialists run ahead, too"
    assert list((fusion.parent.parent / "cache").rglob("*.py")), "nothing was compiled"
