"""Clients that know nothing of us, unmodified: LangChain, LiteLLM, lm-evaluation-harness."""

import json
import os
from pathlib import Path
from typing import Any, Literal

# Before LiteLLM is imported: it would look for prices on the network.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import litellm
import lm_eval
import openai
import pytest
import yaml
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from tests.e2e.conftest import MODEL
from tests.e2e.process import ServerProcess
from tests.fakes import EOS_ID
from tests.reference import read_text
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

QUESTION = "Name three colours."
NUM_TOKENS = 16
lenient = pytest.mark.filterwarnings("ignore")
"""For what others' code is warned of."""
TOLERANCE = 2e-4
"""Of a token's log probability, between two float32 programs."""
DOCS: list[dict[str, Any]] = [
    {"question": "The sea is", "choices": ["deep and blue", "made of stone"], "label": 0},
    {"question": "Two and two make", "choices": ["four", "twenty two", "a"], "label": 1},
    {"question": "A lighthouse shows the way to ", "choices": ["ships", "the stars"], "label": 0},
]


@pytest.fixture
def expected(client: openai.OpenAI) -> str:
    """The greedy answer to the question, as the official client gets it."""
    messages: Any = [{"role": "user", "content": QUESTION}]
    options: dict[str, Any] = {"temperature": 0, "max_tokens": NUM_TOKENS, "extra_body": {"ignore_eos": True}}
    text = client.chat.completions.create(model=MODEL, messages=messages, **options).choices[0].message.content
    assert text
    return text


# LangChain


@tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Weather of a city."""
    return f"Rain in {city}."


def langchain(server: ServerProcess, **options: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": NUM_TOKENS, "max_retries": 0}
    settings |= {"base_url": f"{server.url}/v1", "api_key": "unused"}
    return ChatOpenAI(**settings | options)


def test_langchain_gets_the_answer_whole_and_in_pieces(server: ServerProcess, expected: str) -> None:
    model = langchain(server, extra_body={"ignore_eos": True}, stream_usage=True)
    answer = model.invoke(QUESTION)
    assert answer.content == expected
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == NUM_TOKENS
    pieces = list(model.stream(QUESTION))
    assert "".join(str(piece.content) for piece in pieces) == expected
    assert [piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata] == [NUM_TOKENS]


async def test_langchain_gets_the_answer_asynchronously(server: ServerProcess, expected: str) -> None:
    model = langchain(server, extra_body={"ignore_eos": True})
    assert (await model.ainvoke(QUESTION)).content == expected


def test_langchain_binds_a_tool(server: ServerProcess) -> None:
    model = langchain(server, max_tokens=200, logit_bias={EOS_ID: 100})
    (call,) = model.bind_tools([get_weather], tool_choice="required", strict=True).invoke(QUESTION).tool_calls
    assert call["name"] == "get_weather"
    assert get_weather.invoke(call["args"]) in ("Rain in Oslo.", "Rain in Rome.")


# LiteLLM


def test_litellm_gets_the_answer_whole_and_in_pieces(server: ServerProcess, expected: str) -> None:
    asked: dict[str, Any] = {
        "model": f"openai/{MODEL}",
        "api_base": f"{server.url}/v1",
        "api_key": "unused",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "extra_body": {"ignore_eos": True},
        "num_retries": 0,
    }
    answer = litellm.completion(**asked)
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens == NUM_TOKENS
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)]
    assert "".join(pieces) == expected


def test_litellm_understands_our_errors(server: ServerProcess) -> None:
    asked: dict[str, Any] = {"api_base": f"{server.url}/v1", "api_key": "unused", "num_retries": 0}
    short = [{"role": "user", "content": "Hi"}]
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/other", messages=short, **asked)
    long = [{"role": "user", "content": "word " * 2000}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(model=f"openai/{MODEL}", messages=long, **asked)


# lm-evaluation-harness


def run_lm_eval(folder: Path, task: dict[str, Any], kind: str, url: str, **options: Any) -> list[Any]:
    """Run a task over the documents; the harness's own record of every one, in order."""
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    content = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        **task,
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(content))
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=kind,
        model_args={"model": MODEL, "base_url": url, **options.pop("model_args", {})},
        tasks=["own"],
        task_manager=tasks,
        **options,
    )
    return sorted(results["samples"]["own"], key=lambda sample: sample["doc_id"])


@lenient
def test_lm_eval_scores_choices_as_the_reference_does(server: ServerProcess, tiny_fusion: Path, tmp_path: Path) -> None:
    """A server that returns other log probabilities does not fail there: it silently scores chance."""
    task = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    }
    folder = tiny_fusion.parent / "text"
    url = f"{server.url}/v1/completions"
    model_args = {"tokenizer": str(folder), "num_concurrent": 2}
    samples = run_lm_eval(tmp_path, task, "local-completions", url, model_args=model_args)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    reference = UltraFuserForCausalLM.from_fusion(load_fusion(tiny_fusion))
    for doc, sample in zip(DOCS, samples, strict=True):
        wanted = []
        for choice in doc["choices"]:
            context = doc["question"].rstrip()
            whole = tokenizer.encode(f"{doc['question']} {choice}")
            start = len(tokenizer.encode(context))
            logprobs_TV = read_text(reference, whole)[start - 1 :]
            wanted.append(float(logprobs_TV[range(len(whole) - start), whole[start:]].sum()))
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(wanted, abs=20 * TOLERANCE)
        assert sample["acc"] == float(wanted.index(max(wanted)) == doc["label"])
    assert len({sample["acc"] for sample in samples}) == 2, "both right and wrong answers, or the score shows nothing"


@lenient
def test_lm_eval_reads_chat_answers(server: ServerProcess, client: openai.OpenAI, tmp_path: Path) -> None:
    task = {
        "output_type": "generate_until",
        "doc_to_target": "{{label}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": NUM_TOKENS},
        "metric_list": [{"metric": "exact_match"}],
    }
    url = f"{server.url}/v1/chat/completions"
    samples = run_lm_eval(tmp_path, task, "local-chat-completions", url, apply_chat_template=True)
    for doc, sample in zip(DOCS, samples, strict=True):
        messages: Any = [{"role": "user", "content": doc["question"]}]
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=NUM_TOKENS, stop=["\n\n"]
        )
        assert sample["resps"] == [[answer.choices[0].message.content]]
