"""One real server on the tiny fusion, started once and shared; the official client and a browser talk to it."""

import json
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.e2e.browser import Chromium, Page, find_chromium
from tests.e2e.collector import Collector
from tests.e2e.playground import load
from tests.e2e.process import ServerProcess
from tests.fakes import write_tiny_fusion

MODEL = "tiny"
NO_SPACES = '{"backend": "xgrammar", "disable_any_whitespace": true}'
"""A random model, free to write spaces between JSON tokens, would write nothing else."""

WIDE_CONTEXT = 32768
"""Tokens that a server for agents has room for: the tiny tokenizers make one of every letter or two."""

WIDE_KEY = "a-key-of-the-wide-server"

POISON = 259
"""A token from which on one specialist, "code", computes NaN. Its byte, 0xFF, is in no text, and none draws it."""


@pytest.fixture(scope="session")
def tiny_fusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random specialists with three templates, in float32.

    Deeper than elsewhere: on a loaded machine, an engine that takes 2 ms a step keeps the frontend so busy with tokens
    that it only notices a client has left when everything is generated.
    """
    path = write_tiny_fusion(tmp_path_factory.mktemp("tiny-e2e"), num_layers=(8, 12, 10))
    for marker, name in enumerate(("text", "code", "math")):
        weights = path.parent / name / "model.safetensors"
        tensors = load_file(weights)
        tensors["lm_head.weight"][POISON, marker] = -150  # times 0.1 to 0.3: unlikely by e^-40
        if name == "code":
            tensors["model.embed_tokens.weight"][POISON] = math.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Receives the shared server's traces."""
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def server(
    tiny_fusion: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server with a tool call parser that sends traces."""
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--tool-call-parser", "hermes", "--structured-outputs-config", NO_SPACES]
    options += ["--otlp-traces-endpoint", collector.endpoint]
    server = ServerProcess(tiny_fusion, log, *options)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def wide_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a key on a tiny fusion with room for what agents send at first; answers are greedy and short."""
    path = write_tiny_fusion(tmp_path_factory.mktemp("tiny-wide"), engine={"kv_cache_memory_bytes": 2**28})
    fusion = yaml.safe_load(path.read_text())
    fusion |= {"tool_call_parser": "hermes", "sampling_defaults": {"temperature": 0.0, "max_tokens": 12}}
    path.write_text(yaml.safe_dump(fusion))
    for name in ("text", "code", "math"):
        config = path.parent / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": WIDE_CONTEXT}))
    options = ["--structured-outputs-config", NO_SPACES, "--api-key", WIDE_KEY]
    server = ServerProcess(path, tmp_path_factory.mktemp("wide-server") / "log", *options)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """The official client, which is told every error at once."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def async_client(server: ServerProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official asynchronous client."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The one tab of a real Chromium."""
    path = find_chromium()
    if path is None:
        pytest.skip("needs Chromium; on Debian: apt-get install chromium")
    chromium = Chromium(path, tmp_path_factory.mktemp("chromium"))
    try:
        with chromium.page() as page:
            yield page
    finally:
        chromium.end()


@pytest.fixture
def page(browser: Page, server: ServerProcess) -> Iterator[Page]:
    """The playground in a wide window; afterwards the console is clean, and nothing was asked of anybody else."""
    browser.resize(1280, 860)
    browser.prefer(prefers_color_scheme="light")
    load(browser, server.url)
    yield browser
    assert browser.problems == []
    addresses = [request["url"] for request in browser.requests]
    assert [address for address in addresses if not address.startswith((f"{server.url}/", "blob:", "data:"))] == []
