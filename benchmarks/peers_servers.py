"""What people do today: one plain vLLM server per specialist, mixed by a client. A part of `benchmarks.peers`.

Plain servers give no hidden states, so there is no gate: the client mixes with fixed weights. For every token it asks
every server for the log probabilities of the whole vocabulary; mixing those is mixing logits, up to a constant that
changes no choice (paper, The model).

Shape suffix: V shared vocabulary.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from benchmarks.command import Options, say
from benchmarks.measure import Bar, Comparison, Measured
from benchmarks.workload import random_requests

BAR = Bar(limit=10.0, direction="at least")
TOKEN_ID_PREFIX = "token_id:"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    batch: int = 8
    prompt_length: int = 64
    num_tokens: int = 16
    num_fused_rounds: int = 10


QUICK = Sizes(batch=2, prompt_length=16, num_tokens=2, num_fused_rounds=1)


@dataclass(frozen=True)
class Specialist:
    """One plain server, as the mixing client sees it."""

    client: httpx.AsyncClient
    name: str
    weight: float


def compare_with_servers(options: Options) -> list[Comparison]:
    """Tokens per second of concurrent requests, fused server against client-mixed plain servers, one after the other.

    All servers together would not leave the fused one its cores, so the plain ones have ended before it starts.
    """
    from benchmarks.servers import fused_server, plain_servers, running

    sizes = QUICK if options.quick else Sizes()
    fusion, info = options.load()
    lengths, num_tokens = [sizes.prompt_length] * sizes.batch, [sizes.num_tokens] * sizes.batch
    prompts = [request.prompts[0] for request in random_requests(info, lengths, num_tokens, seed=0)]
    mixed, fused = [], []
    if options.runs_baseline:
        servers = plain_servers(fusion, info, "--max-logprobs", "-1")
        with running(servers):
            urls = {name: server.url for name, server in zip(fusion.specialist_names, servers, strict=True)}
            mixed = asyncio.run(_measure_mixed(urls, info.num_shared_ids, prompts, sizes))
    if options.runs_fused:
        server = fused_server(options)
        with running([server]):
            fused = asyncio.run(_measure_fused(server.url, fusion.name, prompts, sizes))
    comparison = compare(sizes, fused, mixed)
    say(f"{comparison.case}: ratio {comparison.ratio}")
    return [comparison]


def compare(sizes: Sizes, fused: Sequence[float], mixed: Sequence[float]) -> Comparison:
    """The comparison, in tokens per second of the whole batch; one entry per round."""
    sides = [Measured.of(rates) if rates else None for rates in (fused, mixed)]
    return Comparison(
        case=f"client-mixed servers, batch {sizes.batch}",
        unit="tokens/s",
        fused=sides[0],
        baseline=sides[1],
        ratio=sides[0].value / sides[1].value if sides[0] and sides[1] else None,
        bar=BAR,
    )


async def mix_response(
    specialists: Sequence[Specialist], prompt: Sequence[int], num_tokens: int, num_shared_ids: int
) -> list[int]:
    """Greedy tokens of the mixture: one HTTP request per specialist and token, the specialists side by side."""
    token_ids: list[int] = []
    for _ in range(num_tokens):
        rows = await asyncio.gather(*(_next_logprobs(item, [*prompt, *token_ids]) for item in specialists))
        mixed_V = sum(
            item.weight * logprobs_of(row, num_shared_ids) for item, row in zip(specialists, rows, strict=True)
        )
        token_ids.append(int(np.argmax(mixed_V)))
    return token_ids


def logprobs_of(top_logprobs: Mapping[str, float], num_shared_ids: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Log probabilities [V] by token id out of a response's `{"token_id:ID": value}`; ids beyond V are dropped."""
    count = len(top_logprobs)
    start = len(TOKEN_ID_PREFIX)
    ids = np.fromiter((int(key[start:]) for key in top_logprobs), dtype=np.int64, count=count)
    values = np.fromiter(top_logprobs.values(), dtype=np.float64, count=count)
    is_shared = ids < num_shared_ids
    logprobs_V = np.full(num_shared_ids, -np.inf)
    logprobs_V[ids[is_shared]] = values[is_shared]
    return logprobs_V


async def _next_logprobs(specialist: Specialist, token_ids: Sequence[int]) -> dict[str, float]:
    body = {
        "model": specialist.name,
        "prompt": token_ids,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": -1,
        "return_tokens_as_token_ids": True,
    }
    response = await specialist.client.post("/v1/completions", json=body)
    response.raise_for_status()
    logprobs: dict[str, float] = response.json()["choices"][0]["logprobs"]["top_logprobs"][0]
    return logprobs


async def _measure_mixed(
    urls: Mapping[str, str], num_shared_ids: int, prompts: Sequence[Sequence[int]], sizes: Sizes
) -> list[float]:
    clients = [httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) for url in urls.values()]
    specialists = [Specialist(client, name, 1 / len(urls)) for client, name in zip(clients, urls, strict=True)]
    try:
        for num_tokens in (1, sizes.num_tokens):  # the first is the warm-up
            start = time.perf_counter()
            await asyncio.gather(*(mix_response(specialists, p, num_tokens, num_shared_ids) for p in prompts))
            rate = len(prompts) * num_tokens / (time.perf_counter() - start)
        return [rate]
    finally:
        for client in clients:
            await client.aclose()


async def _measure_fused(url: str, model: str, prompts: Sequence[Sequence[int]], sizes: Sizes) -> list[float]:
    bodies = [
        {"model": model, "prompt": p, "max_tokens": sizes.num_tokens, "temperature": 0, "ignore_eos": True}
        for p in prompts
    ]
    rates = []
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        for _ in range(1 + sizes.num_fused_rounds):
            start = time.perf_counter()
            for response in await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies)):
                response.raise_for_status()
                assert response.json()["usage"]["completion_tokens"] == sizes.num_tokens
            rates.append(len(prompts) * sizes.num_tokens / (time.perf_counter() - start))
    return rates[1:]
