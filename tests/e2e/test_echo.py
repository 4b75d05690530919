"""Log probabilities of prompts over the wire: the fused distribution's, in the places where clients look for them."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.e2e.conftest import MODEL
from tests.e2e.process import ServerProcess
from tests.reference import read_text
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

TEXTS = ["Once upon a time there was a lighthouse.", "Two!", "The tide rose, and then it fell again."]
OPTIONS: dict[str, Any] = {"model": MODEL, "temperature": 0, "extra_body": {"ignore_eos": True}}
TOLERANCE = 2e-4
"""Two float32 programs that sum in different orders."""
BATCH_TOLERANCE = 2e-5
"""The same program in a batch of another size."""


@pytest.fixture(scope="module")
def reference(tiny_fusion: Path) -> UltraFuserForCausalLM:
    """The fused model in Transformers."""
    return UltraFuserForCausalLM.from_fusion(load_fusion(tiny_fusion))


@pytest.fixture(scope="module")
def tokenizer(tiny_fusion: Path) -> PreTrainedTokenizerBase:
    """The leader's, which gives raw prompts their token ids."""
    return AutoTokenizer.from_pretrained(tiny_fusion.parent / "text")


def check(choice: Any, text: str, model: UltraFuserForCausalLM, tokenizer: Any) -> None:
    """The echoed prompt's part of a choice is the reference's."""
    token_ids = tokenizer.encode(text)
    logprobs = choice.logprobs
    tokens = [tokenizer.decode([token_id]) for token_id in token_ids]
    assert choice.text.startswith(text)
    assert logprobs.tokens[: len(tokens)] == tokens
    assert logprobs.text_offset[: len(tokens)] == [len("".join(tokens[:end])) for end in range(len(tokens))]
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    wanted_TV = read_text(model, token_ids)
    wanted = wanted_TV[range(len(token_ids) - 1), token_ids[1:]].tolist()
    assert logprobs.token_logprobs[1 : len(tokens)] == pytest.approx(wanted, abs=TOLERANCE)
    for own, top, wanted_V in zip(tokens[1:], logprobs.top_logprobs[1:], wanted_TV, strict=False):
        assert own in top
        assert max(top.values()) == pytest.approx(float(wanted_V.max()), abs=TOLERANCE)


@pytest.mark.parametrize("max_tokens", [0, 1, 8])
def test_an_echoed_prompt_has_the_fused_logprobs(
    client: openai.OpenAI, reference: UltraFuserForCausalLM, tokenizer: Any, max_tokens: int
) -> None:
    (choice,) = client.completions.create(
        prompt=TEXTS[0], echo=True, logprobs=3, max_tokens=max_tokens, **OPTIONS
    ).choices
    check(choice, TEXTS[0], reference, tokenizer)
    assert len(choice.logprobs.tokens) == len(tokenizer.encode(TEXTS[0])) + max_tokens
    assert "".join(choice.logprobs.tokens) == choice.text
    plain = client.completions.create(prompt=TEXTS[0], max_tokens=max(max_tokens, 1), logprobs=3, **OPTIONS).choices[0]
    if max_tokens:
        assert choice.text == TEXTS[0] + plain.text
        assert choice.logprobs.token_logprobs[-max_tokens:] == pytest.approx(
            plain.logprobs.token_logprobs, abs=BATCH_TOLERANCE
        )


def test_lists_of_token_ids_are_scored_as_texts_are(
    client: openai.OpenAI, reference: UltraFuserForCausalLM, tokenizer: Any
) -> None:
    """As lm-evaluation-harness sends them: one more token than it looks at."""
    prompts = [tokenizer.encode(text) for text in TEXTS]
    response = client.completions.create(prompt=prompts, echo=True, logprobs=1, max_tokens=1, seed=1234, **OPTIONS)
    for choice, text in zip(response.choices, TEXTS, strict=True):
        check(choice, text, reference, tokenizer)


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_a_stream_echoes_the_same(client: openai.OpenAI, max_tokens: int) -> None:
    asked: dict[str, Any] = {"prompt": TEXTS, "echo": True, "logprobs": 2, "max_tokens": max_tokens, "n": 1, **OPTIONS}
    whole = client.completions.create(**asked).choices
    chunks = [choice for chunk in client.completions.create(**asked, stream=True) for choice in chunk.choices]
    for choice in whole:
        parts = [part for part in chunks if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        for name in ("tokens", "text_offset"):
            assert _joined(parts, name) == getattr(choice.logprobs, name)
        first, *others = _joined(parts, "token_logprobs")
        assert first is None
        assert others == pytest.approx(choice.logprobs.token_logprobs[1:], abs=BATCH_TOLERANCE)


def _joined(parts: list[Any], name: str) -> list[Any]:
    return [entry for part in parts for entry in getattr(part.logprobs, name)]


def test_every_one_of_n_choices_echoes(client: openai.OpenAI, reference: UltraFuserForCausalLM, tokenizer: Any) -> None:
    asked: dict[str, Any] = {"prompt": TEXTS[0], "echo": True, "logprobs": 1, "max_tokens": 6, "n": 3, "seed": 3}
    options = {**OPTIONS, "temperature": 1}
    whole = client.completions.create(**asked, **options).choices
    for choice in whole:
        check(choice, TEXTS[0], reference, tokenizer)
    assert len({choice.text for choice in whole}) == 3
    texts = ["", "", ""]
    for chunk in client.completions.create(**asked, **options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole]


def test_prompt_logprobs_come_without_an_echo(
    server: ServerProcess, reference: UltraFuserForCausalLM, tokenizer: Any
) -> None:
    token_ids = tokenizer.encode(TEXTS[0])
    body = {"model": MODEL, "prompt": token_ids, "prompt_logprobs": 2, "max_tokens": 1, "temperature": 0}
    (choice,) = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for entries, token_id, wanted_V in zip(others, token_ids[1:], read_text(reference, token_ids), strict=True):
        assert entries[str(token_id)]["logprob"] == pytest.approx(float(wanted_V[token_id]), abs=TOLERANCE)
        best = min(entries.values(), key=lambda entry: entry["rank"])
        assert best["logprob"] == pytest.approx(float(wanted_V.max()), abs=TOLERANCE)


def test_echo_and_weights_go_together(server: ServerProcess) -> None:
    body = {"model": MODEL, "prompt": TEXTS[0], "echo": True, "logprobs": 0, "max_tokens": 5, "temperature": 0}
    body |= {"gate_weights": True, "ignore_eos": True}
    (choice,) = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]
    assert choice["text"].startswith(TEXTS[0])
    assert len(choice["gate_weights"]["content"]) == 5
    lines = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line and not line.endswith("[DONE]")]
    parts = [choice for event in events for choice in event["choices"]]
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert sum(len(part["gate_weights"]["content"]) for part in parts) == 5


@pytest.mark.parametrize("wish", [{"echo": True, "logprobs": True}, {"prompt_logprobs": 1}], ids=["echo", "logprobs"])
def test_a_chats_prompts_differ_and_have_no_logprobs(client: openai.OpenAI, wish: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}], extra_body=wish)
    assert refused.value.param == next(iter(wish))
