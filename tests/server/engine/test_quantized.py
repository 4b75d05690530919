"""Quantised specialists beside others: each computes what vLLM makes of its model alone, whoever leads."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, RequestOutput, TokensPrompt

from tests import quantized
from tests.fakes import build_gate, write_tiny_fusion
from tests.server.engine.harness import Arrival, InProcessEngine, greedy, random_prompts
from tests.server.engine.test_fusions import MAX_TOKENS, specialist_alone

NAMES = ("text", "code", "math")
PROMPTS = [random_prompts([length], seed)[0] for seed, length in enumerate((13, 60, 33))]
PARAMS = greedy(MAX_TOKENS, logprobs=2)
PLAIN: dict[str, Any] = {"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 2**26}

needs_avx512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM has no kernel for weights of 4 bits for CPUs without AVX-512"
)
FORMATS = [
    pytest.param((quantized.int8, "float32"), id="int8"),
    pytest.param((quantized.awq, "bfloat16"), id="awq", marks=needs_avx512),
    pytest.param((quantized.gptq, "bfloat16"), id="gptq", marks=needs_avx512),
]


@pytest.fixture(scope="module", params=FORMATS)
def own_format(request: pytest.FixtureRequest) -> tuple[Any, str]:
    """How weights are quantised, and the type that such models compute in."""
    return request.param


@pytest.fixture(scope="module", params=["text", "code"], ids=["leader", "follower"])
def quantized_one(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, own_format: tuple[Any, str]
) -> tuple[Path, str, str]:
    """A fusion of which one specialist is quantised; that one's name, and the type of all."""
    quantize, dtype = own_format
    path = write_tiny_fusion(tmp_path_factory.mktemp("quantized"), vocab_sizes=(320,) * 3, dtype=dtype)
    quantize(path.with_name(request.param))
    return path, request.param, dtype


@pytest.fixture(scope="module")
def engine(quantized_one: tuple[Path, str, str]) -> Iterator[InProcessEngine]:
    with InProcessEngine(quantized_one[0]) as engine:
        yield engine


def told(outputs: Sequence[RequestOutput]) -> list[tuple[list[int], Any]]:
    return [(list(output.outputs[0].token_ids), output.outputs[0].logprobs) for output in outputs]


def served(engine: InProcessEngine, name: str) -> list[tuple[list[int], Any]]:
    """What the fused engine tells, with a gate that gives one specialist all the weight, exactly."""
    parts = engine.runner._mixer._parts
    assert parts is not None
    parts.gate = build_gate(f"closed:{name}", NAMES, (64,) * 3)
    return told(engine.generate([Arrival([prompt] * 3, PARAMS) for prompt in PROMPTS]))


def test_a_quantised_specialist_equals_its_model_alone_in_vllm(
    engine: InProcessEngine, quantized_one: tuple[Path, str, str]
) -> None:
    path, name, dtype = quantized_one
    plain = LLM(str(path.with_name(name)), dtype=dtype, **PLAIN)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]
    expected = told(plain.generate(prompts, PARAMS, use_tqdm=False))
    plain.llm_engine.engine_core.shutdown()
    assert served(engine, name) == expected


def test_the_others_are_computed_as_they_are(engine: InProcessEngine, quantized_one: tuple[Path, str, str]) -> None:
    path, name, dtype = quantized_one
    kinds = {own: runner.model_config.quantization for own, runner in zip(NAMES, engine.runner.runners, strict=True)}
    assert [own for own, kind in kinds.items() if kind] == [name]
    if dtype == "float32":  # in bfloat16 two programs round differently
        tokens = [token_ids for token_ids, _ in served(engine, "math")]
        assert tokens == [specialist_alone(path.with_name("math"), prompt) for prompt in PROMPTS]
