"""Other fusions: closed and open gates, one specialist, four and five, unequal widths and vocabularies, bfloat16."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fakes import build_gate, write_tiny_fusion
from tests.server.engine.conftest import DRAFTS
from tests.server.engine.harness import Arrival, InProcessEngine, Prompts, greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.gate_file import save_gate
from ultrafuser.gating.model.gate_seats import widened
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.server.engine.shared.extra_args import GATE_WEIGHTS

LENGTHS = [(13, 16, 36), (60, 5, 20), (7, 44, 44)]
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
FIVE = ("text", "code", "math", "law", "art")
MAX_TOKENS = 16


def specialist_alone(folder: Path, prompt: list[int], num_shared: int = 320) -> list[int]:
    """Plain Transformers, greedy, one specialist, only the shared ids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(MAX_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1, :num_shared].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("name", "index"), [("text", 0), ("code", 1), ("math", 2)])
def test_a_gate_closed_on_a_specialist_gives_that_specialist_exactly(tmp_path: Path, name: str, index: int) -> None:
    with InProcessEngine(write_tiny_fusion(tmp_path, gate=f"closed:{name}")) as engine:
        tokens = engine.tokens([Arrival(prompts, greedy(MAX_TOKENS)) for prompts in BATCH])
    assert tokens == [specialist_alone(tmp_path / name, prompts[index]) for prompts in BATCH]


def test_a_single_specialist_equals_plain_vllm(tmp_path: Path) -> None:
    from vllm import LLM, SamplingParams

    path = write_tiny_fusion(
        tmp_path, num_layers=(2,), hidden_sizes=(64,), vocab_sizes=(320,), names=("text",), gate="none"
    )
    prompts = [own[1] for own in BATCH]
    seeded = SamplingParams(temperature=1.0, seed=3, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=2)
    arrivals = [Arrival([prompt], params) for prompt in prompts for params in (greedy(MAX_TOKENS), seeded)]
    with InProcessEngine(path) as fused:
        outputs = fused.generate(arrivals)
    options = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 2**26}
    plain = LLM(str(tmp_path / "text"), **options)
    expected = plain.generate(
        [{"prompt_token_ids": arrival.prompts[0]} for arrival in arrivals],
        [arrival.params for arrival in arrivals],
        use_tqdm=False,
    )
    plain.llm_engine.engine_core.shutdown()
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert ours.outputs[0].logprobs == theirs.outputs[0].logprobs


def gate_joined_by_a_wider_one() -> Gate:
    """A random gate of three, with a seat for a fourth whose states are projected to the size of theirs."""
    gate = widened(build_gate("random", FIVE[:3], (64, 64, 64)), 96)
    with torch.no_grad():
        own = dict(gate.named_parameters())["projections.3.weight"]
        own.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return gate


@pytest.mark.parametrize(
    ("count", "options"), [(4, DRAFTS), (5, {}), (5, DRAFTS)], ids=["four-drafts", "five", "five-drafts"]
)
def test_four_and_five_specialists_equal_the_reference(tmp_path: Path, count: int, options: dict[str, Any]) -> None:
    path = write_tiny_fusion(
        tmp_path,
        names=FIVE[:count],
        num_layers=(2, 1, 3, 1, 2)[:count],
        hidden_sizes=(64, 64, 64, 96 if count == 4 else 64, 64)[:count],
        vocab_sizes=(336, 328, 320, 344, 324)[:count],
        templates=("chatml",) * count,
        seed=11,
    )
    if count == 4:
        save_gate(gate_joined_by_a_wider_one(), tmp_path / "gate.safetensors", FIVE[:4])
    prompts = [random_prompts([own[0], own[1], own[2], own[1], own[0] + 9][:count], own[0]) for own in LENGTHS]
    judge = Judge(UltraFuserForCausalLM.from_fusion(load_fusion(path)))
    with InProcessEngine(path, **options) as engine:
        outputs = engine.generate(
            [Arrival(own, greedy(MAX_TOKENS, extra_args={GATE_WEIGHTS: True})) for own in prompts]
        )
        rounds = [own for report in engine.reports for own in report.rounds]
    assert [list(output.outputs[0].token_ids) for output in outputs] == [
        judge.tokens(own, MAX_TOKENS) for own in prompts
    ]
    for output, own in zip(outputs, prompts, strict=True):
        weights = judge.generation(own, MAX_TOKENS).gate_weights
        np.testing.assert_allclose(output.outputs[0].gate_weights, weights, atol=1e-4)
    leaders = {int(row.argmax()) for own in prompts for row in judge.generation(own, MAX_TOKENS).gate_weights}
    assert len(leaders) > 2, "several lead, and draft"
    assert (sum(own.num_accepted for own in rounds) > 0) == bool(options)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[InProcessEngine, Judge]]:
    """Widths and vocabularies differ; the leader has ids that nobody else knows."""
    path = write_tiny_fusion(
        tmp_path_factory.mktemp("uneven"), hidden_sizes=(64, 128, 96), vocab_sizes=(336, 320, 352), seed=3
    )
    with InProcessEngine(path) as engine:
        yield engine, Judge(UltraFuserForCausalLM.from_fusion(load_fusion(path)))


@pytest.mark.parametrize("prompts", BATCH, ids=["leader-short", "leader-long", "leader-shortest"])
def test_unequal_widths_and_vocabularies_equal_the_reference(
    uneven: tuple[InProcessEngine, Judge], prompts: Prompts
) -> None:
    engine, judge = uneven
    assert engine.tokens([Arrival(prompts, greedy(MAX_TOKENS))]) == [judge.tokens(prompts, MAX_TOKENS)]


def test_ids_outside_the_shared_vocabulary_are_never_sampled(uneven: tuple[InProcessEngine, Judge]) -> None:
    engine, judge = uneven
    wished = dict.fromkeys(range(320, 336), 100.0)
    arrival = Arrival(BATCH[0], greedy(MAX_TOKENS, logit_bias=wished))
    assert engine.tokens([arrival]) == [judge.tokens(BATCH[0], MAX_TOKENS)]


def test_bfloat16_serves_and_every_request_ends(tmp_path: Path) -> None:
    with InProcessEngine(write_tiny_fusion(tmp_path, dtype="bfloat16")) as engine:
        tokens = engine.tokens([Arrival(prompts, greedy(MAX_TOKENS)) for prompts in BATCH])
    assert [len(own) for own in tokens] == [MAX_TOKENS] * 3
    assert all(0 <= token < 320 for own in tokens for token in own)
