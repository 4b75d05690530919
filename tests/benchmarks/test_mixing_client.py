"""The client that mixes plain servers: it picks the best token of the weighted sum, and asks for it as it should."""

import json

import httpx
import numpy as np
import pytest

from benchmarks.peers_servers import Specialist, logprobs_of, mix_response

NUM_SHARED = 50
NUM_IDS = 53


def logprobs_after(seed: int, token_ids: list[int]) -> np.ndarray:
    """What a fake server says: any distribution that depends on the whole context."""
    logits = np.random.default_rng([seed, *token_ids]).normal(size=NUM_IDS) * 3
    logits[NUM_SHARED:] = 100  # ids of this server alone: the likeliest for it, and never to be chosen
    return logits - np.log(np.exp(logits).sum())


def specialist(seed: int, weight: float, requests: list[dict[str, object]]) -> Specialist:
    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        requests.append(body)
        row = logprobs_after(seed, body["prompt"])
        top = {f"token_id:{i}": float(row[i]) for i in np.random.default_rng(0).permutation(NUM_IDS)}
        return httpx.Response(200, json={"choices": [{"logprobs": {"top_logprobs": [top]}}]})

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://fake")
    return Specialist(client, f"s{seed}", weight)


async def test_the_mixture_is_the_weighted_sum_of_log_probabilities() -> None:
    requests: list[dict[str, object]] = []
    weights = [0.5, 0.2, 0.3]
    specialists = [specialist(seed, weight, requests) for seed, weight in enumerate(weights)]
    token_ids = await mix_response(specialists, [7, 8], num_tokens=4, num_shared_ids=NUM_SHARED)
    context = [7, 8]
    for token_id in token_ids:
        mixed = sum(w * logprobs_after(seed, context)[:NUM_SHARED] for seed, w in enumerate(weights))
        assert token_id == int(np.argmax(mixed))
        context.append(token_id)
    assert len(requests) == 3 * 4
    assert all(body["logprobs"] == -1 and body["max_tokens"] == 1 for body in requests)


def test_log_probabilities_are_put_in_the_order_of_the_ids() -> None:
    row = logprobs_of({"token_id:2": -0.5, "token_id:0": -1.5, "token_id:9": -0.1}, num_shared_ids=3)
    assert row.tolist() == [-1.5, -np.inf, -0.5]


async def test_a_server_that_refuses_stops_the_benchmark() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(400))
    client = httpx.AsyncClient(transport=transport, base_url="http://fake")
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        await mix_response([Specialist(client, "s", 1.0)], [1], num_tokens=1, num_shared_ids=3)
