"""Prompt logprobs are the fused distribution's, under everything that touches the reading of a prompt."""

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import RequestOutput, SamplingParams
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, PromptLogprobs
from vllm.v1.engine.async_llm import AsyncLLM

from tests.fakes import write_tiny_fusion
from tests.reference import read_text
from tests.server.engine.conftest import CONFIGURATIONS
from tests.server.engine.harness import Arrival, InProcessEngine, Prompts, greedy, random_prompts
from tests.server.engine.judge import MIN_GAP, Judge
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.server.engine.client.async_llm import FusedAsyncLLM
from ultrafuser.server.engine.worker import prompt_logprobs

Engines = Callable[[str], InProcessEngine]
LENGTHS = [50, 1, 2, 100, 16, 17, 33]
"""One token, which nothing predicts; around the edges of 16-token chunks and 32-token blocks."""
NUM_TOP = [5, 0, 1, 2, 5, 0, 20]
TEXTS = [random_prompts([length], seed=200 + index)[0] for index, length in enumerate(LENGTHS)]
TOLERANCE = 2e-4
"""Of log probabilities: the tests of sampling hold the response's to the same."""


def alike(text: list[int]) -> Prompts:
    """One prompt that all three specialists read."""
    return [text] * 3


def asking(text: list[int], num_top: int, step: int = 0, max_tokens: int = 4, **extra: Any) -> Arrival:
    return Arrival(alike(text), greedy(max_tokens, prompt_logprobs=num_top, logprobs=0), step=step, **extra)


def check(found: PromptLogprobs | None, text: list[int], num_top: int, judge: Judge) -> None:
    """Every entry has the reference's log probability and rank, and the best ones are there."""
    assert found is not None
    assert len(found) == len(text)
    assert found[0] is None
    if len(text) == 1:
        return
    logprobs_TV = read_text(judge.model, text)
    for entries, target, logprobs_V in zip(found[1:], text[1:], logprobs_TV, strict=True):
        assert entries is not None
        assert next(iter(entries)) == target
        best = logprobs_V.topk(num_top + 1)
        assert len(entries) == num_top + (target not in sorted(entries, key=lambda i: entries[i].rank)[:num_top])
        if num_top and float(best.values[0] - best.values[1]) > MIN_GAP:
            assert min(entries, key=lambda i: entries[i].rank) == int(best.indices[0])
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(float(logprobs_V[token]), abs=TOLERANCE)
            check_rank(entry.rank, logprobs_V, token)


def check_rank(rank: int, logprobs_V: Tensor, token: int) -> None:
    """vLLM counts what is at least as likely; what is nearly as likely may stand on either side."""
    own = float(logprobs_V[token])
    surely = int((logprobs_V > own + TOLERANCE).sum()) + 1
    perhaps = int((logprobs_V >= own - TOLERANCE).sum())
    assert surely <= rank <= perhaps


def check_all(outputs: list[RequestOutput], judge: Judge) -> None:
    for text, num_top, output in zip(TEXTS, NUM_TOP, outputs, strict=True):
        check(output.prompt_logprobs, text, num_top, judge)
        assert list(output.outputs[0].token_ids) == judge.tokens(alike(text), 4)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("steps_apart", [0, 2])
def test_prompt_logprobs_equal_the_references(
    engine_of: Engines, judge: Judge, configuration: str, steps_apart: int
) -> None:
    """Beside each other, and beside requests whose specialists read prompts of different lengths."""
    engine = engine_of(configuration)
    others = [random_prompts(lengths, seed) for seed, lengths in enumerate([(13, 16, 36), (100, 20, 7)])]
    neighbours = [Arrival(own, greedy(20), step=index) for index, own in enumerate(others)]
    arrivals = [
        asking(text, num_top, step=index * steps_apart)
        for index, (text, num_top) in enumerate(zip(TEXTS, NUM_TOP, strict=True))
    ]
    outputs = engine.generate([*neighbours, *arrivals])
    check_all(outputs[2:], judge)
    assert [list(output.outputs[0].token_ids) for output in outputs[:2]] == [judge.tokens(own, 20) for own in others]
    assert all(output.prompt_logprobs is None for output in outputs[:2])
    assert engine.runner.leader.num_prompt_logprobs == {}


@pytest.mark.parametrize("configuration", [name for name in CONFIGURATIONS if "pressure-budget" in name])
def test_a_prompt_that_is_put_back_half_read_is_read_again(
    engine_of: Engines, judge: Judge, configuration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(configuration)
    half_read: list[str] = []
    preempt = engine.scheduler._preempt_request

    def spy(request: Any, *args: Any, **kwargs: Any) -> Any:
        if 0 < request.num_computed_tokens < request.num_prompt_tokens and request.sampling_params.prompt_logprobs:
            half_read.append(request.request_id)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", spy)
    # Four blocks of twelve when the text arrives, which needs seven; eight before it is read.
    growing = [Arrival(random_prompts((20, 12, 16), seed=90 + index), greedy(60)) for index in range(4)]
    text = random_prompts([200], seed=300)[0]
    *_, output = engine.generate([*growing, asking(text, 3, step=5)])
    assert half_read, "the prompt was not put back while it was read"
    check(output.prompt_logprobs, text, 3, judge)


def test_hidden_states_of_all_specialists_may_lie_in_the_same_memory(
    engine: InProcessEngine, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do where CUDA graphs compute them; a prompt was scored with what the last specialist had left there."""
    pool = torch.empty(2**16)

    def forward(own: Callable[..., Tensor], **inputs: Tensor) -> Tensor:
        hidden_TD = own(**inputs)
        return pool[: hidden_TD.numel()].view_as(hidden_TD).copy_(hidden_TD)

    for runner in engine.runner.runners:
        monkeypatch.setattr(runner, "_model_forward", partial(forward, runner._model_forward))
        monkeypatch.setattr(runner.compilation_config, "max_cudagraph_capture_size", 512)
    text = random_prompts([50], seed=403)[0]
    (output,) = engine.generate([asking(text, 3)])
    check(output.prompt_logprobs, text, 3, judge)


def test_what_is_cached_is_read_again(engine: InProcessEngine, judge: Judge) -> None:
    text = random_prompts([100], seed=400)[0]
    engine.generate([Arrival(alike(text), greedy(1))])
    plain, scored = engine.generate([Arrival(alike(text), greedy(1)), asking(text, 1)])
    assert plain.num_cached_tokens == 96
    assert scored.num_cached_tokens == 0
    check(scored.prompt_logprobs, text, 1, judge)


def test_positions_are_scored_in_parts(engine: InProcessEngine, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a whole prompt would not fit on a device."""
    monkeypatch.setattr(prompt_logprobs, "MAX_POSITIONS", 7)
    widths: list[int] = []
    for runner in engine.runner.runners:
        compute = runner.model.compute_logits

        def spy(hidden: Tensor, compute: Any = compute) -> Tensor:
            widths.append(hidden.shape[0])
            return compute(hidden)

        monkeypatch.setattr(runner.model, "compute_logits", spy)
    text = random_prompts([50], seed=401)[0]
    (output,) = engine.generate([asking(text, 2, max_tokens=1)])
    check(output.prompt_logprobs, text, 2, judge)
    assert widths == [1] * 3 + [7] * 21


@pytest.mark.parametrize("configuration", ["sync", "async-budget-16"])
def test_several_responses_come_with_the_prompt(engine_of: Engines, judge: Judge, configuration: str) -> None:
    params = SamplingParams(temperature=1.0, n=3, seed=5, ignore_eos=True, max_tokens=3, prompt_logprobs=1)
    (output,) = engine_of(configuration).generate([Arrival(alike(TEXTS[0]), params)])
    assert len(output.outputs) == 3
    check(output.prompt_logprobs, TEXTS[0], 1, judge)


def test_an_aborted_request_is_forgotten(engine_of: Engines, judge: Judge) -> None:
    engine = engine_of("sync-budget-16")
    engine.generate([asking(TEXTS[3], 1, abort_after=2), Arrival(alike(TEXTS[0]), greedy(8))])
    assert engine.runner.leader.num_prompt_logprobs == {}


class Replay(FusedAsyncLLM):
    """The engine's own last step over outputs that are there already."""

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass


async def test_a_response_that_joins_anothers_stream_late_has_the_prompt_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM merges its first part, which has the log probabilities, into a part of the other one, which has none."""
    table: PromptLogprobs = [None, {5: Logprob(-1.0)}]

    def output(prompt_logprobs: PromptLogprobs, index: int) -> RequestOutput:
        completion = CompletionOutput(index, "", [7], 0.0, None)
        return RequestOutput("r", None, [4, 5], prompt_logprobs, [completion], finished=False)

    async def outputs(_: Any) -> AsyncIterator[RequestOutput]:
        yield output(table, 0)
        late = output([], 0)
        late.add(output(table, 1), aggregate=True)
        yield late

    monkeypatch.setattr(AsyncLLM, "generate", outputs)
    _, late = [part async for part in Replay().generate()]
    assert [completion.index for completion in late.outputs] == [0, 1]
    assert late.prompt_logprobs == table


def test_they_are_not_the_leaders_own(engine: InProcessEngine, judge: Judge) -> None:
    """The test of the tests: the leader alone, which plain vLLM asks, says something else."""
    text = TEXTS[0]
    leader_TV = judge.model.specialists[0](torch.tensor([text])).logits[0].detach().log_softmax(-1)
    fused_TV = read_text(judge.model, text)
    own = leader_TV[range(len(text) - 1), text[1:]]
    fused = fused_TV[range(len(text) - 1), text[1:]]
    assert float((own - fused).abs().median()) > 100 * TOLERANCE


def test_a_single_specialist_scores_prompts_too(tmp_path: Path) -> None:
    """Without a gate the distribution is the model's own."""
    one: dict[str, Any] = {"num_layers": (2,), "hidden_sizes": (64,), "vocab_sizes": (320,)}
    path = write_tiny_fusion(tmp_path, names=("only",), gate="none", **one)
    judge = Judge(UltraFuserForCausalLM.from_fusion(load_fusion(path)))
    text = TEXTS[0]
    with InProcessEngine(path, max_num_seqs=4) as engine:
        (output,) = engine.generate([Arrival([text], greedy(1, prompt_logprobs=1))])
    logprobs_TV = read_text(judge.model, text)
    for entries, target, logprobs_V in zip(output.prompt_logprobs[1:], text[1:], logprobs_TV, strict=True):
        assert entries[target].logprob == pytest.approx(float(logprobs_V[target]), abs=TOLERANCE)
