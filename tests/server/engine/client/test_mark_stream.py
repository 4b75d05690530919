"""The gate's weights of every generated token, those of the reference, and whether it was drafted: under everything
that touches scheduling."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import RequestOutput
from vllm.outputs import CompletionOutput

from tests.prompts import prompts_of
from tests.server.engine.conftest import CONFIGURATIONS
from tests.server.engine.harness import Arrival, InProcessEngine, Prompts, greedy, random_prompts
from tests.server.engine.judge import MIN_GAP, Judge
from ultrafuser.gating.model.decoding import Generation
from ultrafuser.gating.model.fusion import load_fusion, save_fusion
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.server.engine.client.mark_stream import History, Takeover
from ultrafuser.server.engine.shared.extra_args import GATE_WEIGHTS

ASKING = {GATE_WEIGHTS: True}
MAX_TOKENS = 20
LENGTHS = [(13, 16, 36), (100, 20, 7), (1, 1, 60), (50, 50, 50), (5, 90, 33)]
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
# Weights are smooth in hidden states, which two float32 programs compute alike to some 1e-5.
TOLERANCE = 1e-4


def weights_of(output: RequestOutput) -> Any:
    """The weights of a final output."""
    return output.outputs[0].gate_weights


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_every_token_comes_with_the_references_weights(
    engine_of: Callable[[str], InProcessEngine], judge: Judge, configuration: str
) -> None:
    params = greedy(MAX_TOKENS, extra_args=ASKING)
    arrivals = [Arrival(prompts, params, step=index) for index, prompts in enumerate(BATCH)]
    for prompts, output in zip(BATCH, engine_of(configuration).generate(arrivals), strict=True):
        wanted = judge.generation(prompts, MAX_TOKENS)
        assert list(output.outputs[0].token_ids) == wanted.token_ids
        assert weights_of(output).shape == (MAX_TOKENS, 3)
        np.testing.assert_allclose(weights_of(output), wanted.gate_weights.numpy(), atol=TOLERANCE, rtol=0)


def test_a_request_that_does_not_ask_gets_none(engine: InProcessEngine) -> None:
    asked, plain = [Arrival(BATCH[0], greedy(4, extra_args=extra)) for extra in (ASKING, None)]
    with_weights, without = engine.generate([asked, plain])
    assert weights_of(with_weights) is not None
    assert weights_of(without) is None
    assert not engine.scheduler._wanting, "what has ended is forgotten"


def test_an_aborted_request_is_forgotten(engine: InProcessEngine) -> None:
    engine.generate([Arrival(BATCH[0], greedy(40, extra_args=ASKING), abort_after=3), Arrival(BATCH[1], greedy(8))])
    assert not engine.scheduler._wanting


def part(tokens: list[int], history: Any, index: int = 0) -> CompletionOutput:
    return CompletionOutput(index, "", tokens, 0.0, None, routed_experts=history)


def merged(first: CompletionOutput, second: CompletionOutput) -> CompletionOutput:
    """As vLLM joins two parts of a stream that the client has not taken."""
    outputs = [RequestOutput("r", None, [], None, [completion], finished=False) for completion in (first, second)]
    outputs[0].add(outputs[1], aggregate=True)
    return outputs[0].outputs[0]


def test_parts_of_a_stream_carry_their_own_tokens_weights_also_when_they_are_merged() -> None:
    rows = [np.array([[token, token, token, token % 2]], dtype=np.float32) for token in range(5)]
    chunks = rows[:1]
    history = History(chunks)
    takeover = Takeover()
    first = part([10], history)
    takeover.take(first)
    assert first.gate_weights.tolist() == [[0, 0, 0]]
    chunks += rows[1:]
    joined = merged(part([11], History(chunks)), part([12, 13], History(chunks)))
    takeover.take(joined)
    assert joined.gate_weights.tolist() == [[1] * 3, [2] * 3, [3] * 3]
    assert joined.drafted.tolist() == [True, False, True]
    nothing = part([], History(chunks))
    takeover.take(nothing)
    assert (nothing.gate_weights, nothing.drafted) == (None, None)
    assert nothing.routed_experts is None


def test_choices_of_one_request_are_counted_apart() -> None:
    takeover = Takeover()
    histories = [[np.full((1, 2), 10 * index + token, dtype=np.float32) for token in range(3)] for index in range(2)]
    found = []
    for tokens in ([0, 1], [2]):
        for index, chunks in enumerate(histories):
            completion = part(tokens, History(chunks), index)
            takeover.take(completion)
            found.append(completion.gate_weights[:, 0].tolist())
    assert found == [[0, 1], [10, 11], [2], [12]]


QUESTIONS = (
    "Name three rivers in Europe.",
    "Write a Python function that reverses a list.",
    "Tom has 3 boxes with 12 apples each. He eats 5. How many are left?",
)


@dataclass
class Demo:
    """What the demo's reference says to the questions."""

    path: Path
    prompts: list[Prompts]
    eos_token_ids: tuple[int, ...]
    wanted: list[Generation]


@pytest.fixture(scope="module")
def demo(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo in float32, read by its reference."""
    fusion = materialize(load_fusion("demo"), model_cache)
    path = tmp_path_factory.mktemp("demo") / "fusion.yaml"
    save_fusion(fusion, path)
    prompts = [prompts_of(fusion, question) for question in QUESTIONS]
    assert len({len(prompt) for prompt in prompts[0]}) == 3, "specialists must differ in the step they are ready in"
    reference = UltraFuserForCausalLM.from_fusion(fusion)
    ends = fusion.eos_token_ids
    wanted = reference.respond(prompts, max_new_tokens=MAX_TOKENS, eos_token_ids=ends, use_cache=True)
    return Demo(path, prompts, ends, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [pytest.param(2048, marks=pytest.mark.long), 16])
def test_the_demos_trained_gate_gives_the_references_weights(budget: int, demo: Demo) -> None:
    options: dict[str, Any] = {"kv_cache_memory_bytes": 2**28, "max_model_len": 512, "max_num_batched_tokens": budget}
    ends = list(demo.eos_token_ids)
    params = greedy(MAX_TOKENS, ignore_eos=False, stop_token_ids=ends, extra_args=ASKING)
    with InProcessEngine(demo.path, dtype="float32", max_num_seqs=8, **options) as engine:
        outputs = engine.generate([Arrival(own, params) for own in demo.prompts])
    leaders = set()
    for output, generation in zip(outputs, demo.wanted, strict=True):
        # From the first near-tie on, two float32 programs may part.
        decided = [float(gap) > MIN_GAP for gap in generation.top2_gap]
        count = decided.index(False) if False in decided else len(decided)
        assert count >= MAX_TOKENS // 4
        assert list(output.outputs[0].token_ids)[:count] == generation.token_ids[:count]
        found = weights_of(output)[:count]
        np.testing.assert_allclose(found, generation.gate_weights[:count].numpy(), atol=10 * TOLERANCE, rtol=0)
        leaders.add(int(found.mean(axis=0).argmax()))
    assert leaders == {0, 1, 2}, "each question is of another specialist's domain"
