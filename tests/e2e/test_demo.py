"""The demo as a new user gets it, in float32: real models, many streams at once, exactly what each says alone."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch

from tests.e2e.process import ServerProcess
from tests.prompts import prompts_of
from tests.server.engine.judge import MIN_GAP
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

MODEL = "ultrafuser-demo"
NUM_STREAMS = 32
MAX_TOKENS = 6
SUBJECTS = ("the sea", "a prime number", "a hash table", "rain", "a triangle", "a loop", "bread", "the moon")
TASKS = ("Explain {} in one sentence.", "Write a haiku about {}.", "Why is {} useful?", "Give me a fact about {}.")
QUESTIONS = [task.format(subject) for subject in SUBJECTS for task in TASKS]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Iterator[ServerProcess]:
    """The demo preset in float32, whose CPU kernels give a row the same result in every batch."""
    log = tmp_path_factory.mktemp("demo") / "log"
    server = ServerProcess(Path("demo"), log, "--dtype", "float32", "--cache", str(model_cache))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


async def stream(client: openai.AsyncOpenAI, question: str) -> str:
    """The text of a greedy streamed response."""
    chunks = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        stream=True,
        temperature=0,
        max_tokens=MAX_TOKENS,
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])


async def test_32_streams_at_once_say_what_each_says_alone(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        together = await asyncio.gather(*(stream(client, question) for question in QUESTIONS))
        alone = [await stream(client, question) for question in QUESTIONS]
    assert len(QUESTIONS) == NUM_STREAMS
    assert list(together) == alone
    assert len(set(alone)) > NUM_STREAMS // 2


def test_the_text_is_the_references(server: ServerProcess, model_cache: Path) -> None:
    fusion = materialize(load_fusion("demo"), model_cache)
    reference = UltraFuserForCausalLM.from_fusion(fusion, dtype=torch.float32)
    questions = QUESTIONS[::8]
    prompts = [prompts_of(fusion, question) for question in questions]
    generations = reference.respond(
        prompts, max_new_tokens=MAX_TOKENS, eos_token_ids=fusion.eos_token_ids, use_cache=True
    )
    num_compared = 0
    for question, generation in zip(questions, generations, strict=True):
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "return_token_ids": True,
        }
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
        # Real models come to near-ties; from the first one on, two float32 programs may part.
        decided = [float(gap) > MIN_GAP for gap in generation.top2_gap]
        num_decided = decided.index(False) if False in decided else len(decided)
        assert response["choices"][0]["token_ids"][:num_decided] == list(generation.token_ids)[:num_decided]
        num_compared += num_decided
    assert num_compared > len(questions) * MAX_TOKENS // 2
