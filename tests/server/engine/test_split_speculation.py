"""Drafts where each specialist has ranks of its own: the same tokens, and the same drafts, as on shared ranks."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.draft_heads import write_trained_head
from tests.fakes import write_tiny_fusion
from tests.reference import read_text
from tests.server.engine.conftest import BUDGET_16, DRAFTS, GRAMMAR, PRESSURE
from tests.server.engine.harness import Arrival, InProcessEngine, Noisy, greedy, random_prompts, serve
from tests.server.engine.judge import Judge
from tests.server.engine.test_speculation import BATCH, NUM_TOKENS, VARIANTS, told
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.server.engine.shared.extra_args import DRAFTED, FORCED_TOKEN_IDS, GATE_WEIGHTS
from ultrafuser.server.engine.shared.round import Round, Undrafted
from ultrafuser.server.engine.worker import drafting
from ultrafuser.server.engine.worker.lookahead import Ahead

SPLIT: dict[str, Any] = {"placement": "split", "max_num_seqs": 8}
ARRIVALS = [Arrival(own, greedy(NUM_TOKENS), step=2 * index) for index, own in enumerate(BATCH)]
ASKING = {GATE_WEIGHTS: True, DRAFTED: True}
TOLERANCE = 2e-4
"""Of log probabilities: float32 programs that sum in different orders; logits here are of the order of ten."""


@pytest.fixture(scope="module")
def head(tiny_fusion: Path, judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a head that has learnt the answers."""
    answers = [(prompts, judge.tokens(prompts, NUM_TOKENS)) for prompts in BATCH]
    path = write_trained_head(tiny_fusion, judge.model, answers, tmp_path_factory.mktemp("heads") / "trained")
    return {"speculation": {"drafter": "head", "path": str(path), "min_tokens": 4, "max_tokens": 4}}


@pytest.fixture(scope="module")
def split_of(
    tiny_fusion: Path, head: dict[str, Any], shared_groups: None
) -> Iterator[Callable[[str], InProcessEngine]]:
    """Three specialists on a rank each, with four drafts a request in every step."""
    configurations: dict[str, dict[str, Any]] = {
        "leading": {**DRAFTS, **BUDGET_16},
        "leading-hidden": {**DRAFTS, "exchange": "hidden", **BUDGET_16},
        "head-pressure": {**head, **PRESSURE},
        "head-hidden": {**head, "exchange": "hidden", **BUDGET_16},
    }
    engines: dict[str, InProcessEngine] = {}

    def get(name: str) -> InProcessEngine:
        if name not in engines:
            engine = InProcessEngine(tiny_fusion, **(SPLIT | configurations[name]), **GRAMMAR)
            engines[name] = stack.enter_context(engine)
        engines[name].llm.collective_rpc(spoil, args=(False,))
        return engines[name]

    with ExitStack() as stack:
        yield get


def spoil(worker: Any, is_noisy: bool) -> None:
    """Have a rank of the leader's spoil drafts of all specialists, or not."""
    speculation = getattr(worker.model_runner, "speculation", None)
    if speculation is not None:
        own = speculation.drafter
        own = own._own if isinstance(own, Noisy) else own
        speculation.drafter = Noisy(own) if is_noisy else own


def rounds_of(engine: InProcessEngine, arrivals: list[Arrival]) -> tuple[list[Any], list[Round]]:
    """The outputs, and what became of drafts."""
    engine.reports.clear()
    outputs = engine.generate(arrivals)
    return outputs, [own for report in engine.reports for own in report.rounds]


def num_held(rounds: list[Round]) -> int:
    """How many drafts were right."""
    return sum(own.num_accepted for own in rounds)


@pytest.mark.parametrize("is_noisy", [False, True])
@pytest.mark.parametrize("configuration", ["leading", pytest.param("leading-hidden", marks=pytest.mark.long)])
def test_tokens_and_weights_are_the_references(
    split_of: Callable[[str], InProcessEngine], judge: Judge, configuration: str, is_noisy: bool
) -> None:
    engine = split_of(configuration)
    engine.llm.collective_rpc(spoil, args=(is_noisy,))
    params = greedy(NUM_TOKENS, extra_args=ASKING)
    outputs, rounds = rounds_of(engine, [Arrival(own, params, step=2 * i) for i, own in enumerate(BATCH)])
    for prompts, output in zip(BATCH, outputs, strict=True):
        wanted = judge.generation(prompts, NUM_TOKENS)
        assert list(output.outputs[0].token_ids) == list(wanted.token_ids)
        np.testing.assert_allclose(output.outputs[0].gate_weights, wanted.gate_weights.numpy(), atol=1e-4)
    assert num_held(rounds) == sum(output.outputs[0].drafted.sum() for output in outputs) > 10
    assert {own.drafter for own in rounds} == {"leading", None}


def let_who_leads_draft(worker: Any, is_fixed: bool) -> None:
    """Whatever passes take by a rank's clock, by which one specialist may draft for all; or as ever."""
    speculation = getattr(worker.model_runner, "speculation", None)
    if speculation is None:
        return
    if is_fixed:
        speculation.lookahead.choose = lambda leading, *_: {own: Ahead(index, 4) for own, index in leading.items()}
    else:
        del speculation.lookahead.choose


@pytest.mark.parametrize("configuration", ["leading", pytest.param("leading-hidden", marks=pytest.mark.long)])
def test_drafts_are_those_of_shared_ranks(
    engine_of: Callable[[str], InProcessEngine], split_of: Callable[[str], InProcessEngine], configuration: str
) -> None:
    """Greedy ones, and those drawn with the noise that the sampler will use: as many of each request hold."""
    seeded = SamplingParams(temperature=0.7, seed=1, top_p=0.9, max_tokens=NUM_TOKENS, ignore_eos=True)
    arrivals = [*ARRIVALS, Arrival(BATCH[0], seeded, step=3), Arrival(BATCH[1], seeded, step=5)]
    shared, split = engine_of("drafts-budget-16"), split_of(configuration)
    assert isinstance(shared.drafter, Noisy)
    rounds = []
    for engine in (shared, split):
        engine.reports.clear()
        assert engine.llm.reset_prefix_cache(), "else the schedule depends on what was served before"
        engine.llm.collective_rpc(let_who_leads_draft, args=(True,))
        if engine is shared:
            serve(shared, shared.drafter._own, arrivals)
        else:
            engine.generate(arrivals)
        engine.llm.collective_rpc(let_who_leads_draft, args=(False,))
        rounds.append([own for report in engine.reports for own in report.rounds])
    wanted, found = rounds
    assert found == wanted
    assert num_held(found) > 20


def watch_errands(worker: Any, folder: Path) -> None:
    """Note when a rank's specialist drafts, and for how many requests.

    On busy cores tiny models are through before another process has its turn. So each waits a moment for another that
    drafts as well, whose mark is in the folder, until two have met.
    """
    run = drafting.Errand.run
    own, met = folder / str(os.getpid()), folder / "met"

    def watched(errand: drafting.Errand, *args: Any) -> drafting.Drafts:
        start = time.perf_counter()
        own.touch()
        while not met.exists() and time.perf_counter() < start + 1:
            if set(folder.iterdir()) > {own}:
                met.touch()
            time.sleep(0.001)
        drafts = run(errand, *args)
        worker.errands.append((start, time.perf_counter(), len(errand.requests)))
        own.unlink()
        return drafts

    worker.errands = []
    setattr(drafting.Errand, "run", watched)  # noqa: B010  the rank's own, to its end


def errands(worker: Any) -> list[tuple[float, float, int]]:
    """What a rank has noted."""
    return list(worker.errands)


def test_each_specialist_drafts_what_it_leads_and_several_do_so_at_once(
    split_of: Callable[[str], InProcessEngine], judge: Judge, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = split_of("leading")
    engine.llm.collective_rpc(watch_errands, args=(tmp_path_factory.mktemp("errands"),))
    engine.llm.collective_rpc(let_who_leads_draft, args=(True,))  # a wait for each other is no measure of a pass
    outputs, rounds = rounds_of(engine, [Arrival(own, greedy(NUM_TOKENS)) for own in BATCH])
    engine.llm.collective_rpc(let_who_leads_draft, args=(False,))
    noted = engine.llm.collective_rpc(errands)
    assert [list(own.outputs[0].token_ids) for own in outputs] == [judge.tokens(own, NUM_TOKENS) for own in BATCH]
    assert all(noted), "each of them leads some of the tokens"
    num_drafted = sum(own.num_drafts > 0 for own in rounds)
    assert num_drafted <= sum(number for own in noted for *_, number in own) <= num_drafted + len(BATCH)
    spans = [(start, end, rank) for rank, own in enumerate(noted) for start, end, _ in own]
    assert any(a < d and c < b and own != other for a, b, own in spans for c, d, other in spans)


@pytest.mark.parametrize("configuration", ["head-pressure", pytest.param("head-hidden", marks=pytest.mark.long)])
def test_a_trained_head_sees_what_all_specialists_send(
    split_of: Callable[[str], InProcessEngine], judge: Judge, configuration: str
) -> None:
    engine = split_of(configuration)
    arrivals = ARRIVALS[:2] if configuration == "head-pressure" else ARRIVALS  # what is preempted, it is shown no more
    outputs, rounds = rounds_of(engine, arrivals)
    assert [list(own.outputs[0].token_ids) for own in outputs] == [
        judge.tokens(own.prompts, NUM_TOKENS) for own in arrivals
    ]
    assert num_held(rounds) > 0.6 * NUM_TOKENS * len(arrivals), "it has learnt the answers by heart"
    assert {own.drafter for own in rounds} <= {"head", None}


@pytest.mark.parametrize("is_noisy", [False, True])
def test_preempted_requests_resume_exactly(
    split_of: Callable[[str], InProcessEngine], judge: Judge, monkeypatch: pytest.MonkeyPatch, is_noisy: bool
) -> None:
    engine = split_of("head-pressure")
    engine.llm.collective_rpc(spoil, args=(is_noisy,))
    preempted: list[int] = []
    preempt = engine.scheduler._preempt_request

    def spy(request, *args, **kwargs):
        preempted.append(request.num_output_tokens)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", spy)
    assert engine.tokens([Arrival(own, greedy(NUM_TOKENS)) for own in BATCH]) == [
        judge.tokens(own, NUM_TOKENS) for own in BATCH
    ]
    assert any(preempted), "nothing was preempted after its first token"


def test_the_context_is_filled_to_its_last_token(split_of: Callable[[str], InProcessEngine], judge: Judge) -> None:
    """A follower's own prompt is the longest: the leader knows how much room that has."""
    engine = split_of("head-pressure")  # whose context has 256 tokens
    for longest in (200, 217):
        prompts = random_prompts((20, longest, 30), seed=longest)
        (output,), rounds = rounds_of(engine, [Arrival(prompts, greedy(256 - longest))])
        assert list(output.outputs[0].token_ids) == judge.tokens(prompts, 256 - longest)
        assert Undrafted.CONTEXT in {own.undrafted for own in rounds}


def test_an_earlier_response_is_found_in_the_cache(split_of: Callable[[str], InProcessEngine], judge: Judge) -> None:
    """Though drafts that did not hold were written ahead of it."""
    engine = split_of("leading")
    engine.llm.collective_rpc(spoil, args=(True,))
    first, glue = random_prompts((40, 33, 45), seed=9), random_prompts((9, 4, 11), seed=10)
    (response,) = engine.tokens([Arrival(first, greedy(90))])
    follow_up = [prompt + response + own for prompt, own in zip(first, glue, strict=True)]
    (output,) = engine.generate([Arrival(follow_up, greedy(8))])
    assert list(output.outputs[0].token_ids) == judge.tokens(follow_up, 8)
    assert output.num_cached_tokens == 96


def test_an_abort_leaves_the_others_untouched(split_of: Callable[[str], InProcessEngine], judge: Judge) -> None:
    engine = split_of("leading")
    arrivals = [Arrival(own, greedy(NUM_TOKENS), step=i) for i, own in enumerate(BATCH)]
    for leaver, after in [(1, 2), (3, 9), (4, 5)]:
        arrivals[leaver].abort_after = after
    outputs = engine.generate(arrivals)
    stayed = [0, 2, 5]
    assert [list(outputs[i].outputs[0].token_ids) for i in stayed] == [
        judge.tokens(BATCH[i], NUM_TOKENS) for i in stayed
    ]
    assert engine.tokens([Arrival(BATCH[3], greedy(2))]) == [judge.tokens(BATCH[3], 2)]
    engine.llm.step()  # the finished ids travel with the next step
    assert engine.scheduler.get_request_counts() == (0, 0)


def test_seeded_tokens_and_logprobs_are_those_without_drafts(
    engine_of: Callable[[str], InProcessEngine], split_of: Callable[[str], InProcessEngine]
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    structured = {"structured_outputs": StructuredOutputsParams(json=schema), "ignore_eos": False, "max_tokens": 60}
    common = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 24, "logprobs": 2}
    variants = [*VARIANTS, {"temperature": 0.0, **structured}, {"seed": 3, **structured}]
    arrivals = [
        Arrival(BATCH[index % len(BATCH)], SamplingParams(**(common | own)), step=index)
        for index, own in enumerate(variants)
    ]
    wanted = [told(own) for own in engine_of("sync").generate(arrivals)]
    engine = split_of("leading")
    engine.llm.collective_rpc(spoil, args=(True,))
    outputs, rounds = rounds_of(engine, arrivals)
    assert [told(own) for own in outputs] == wanted
    assert num_held(rounds) > 20


def test_prompts_are_scored_as_the_reference_does(split_of: Callable[[str], InProcessEngine], judge: Judge) -> None:
    """In chunks, beside a request that decodes with drafts."""
    (text,) = random_prompts([50], seed=80)
    arrivals = [Arrival(BATCH[0], greedy(NUM_TOKENS)), Arrival([text] * 3, greedy(9, prompt_logprobs=0), step=2)]
    decoded, scored = split_of("leading").generate(arrivals)
    assert list(decoded.outputs[0].token_ids) == judge.tokens(BATCH[0], NUM_TOKENS)
    assert list(scored.outputs[0].token_ids) == judge.tokens([text] * 3, 9)
    found = [own[token].logprob for own, token in zip(scored.prompt_logprobs[1:], text[1:], strict=True)]
    assert found == pytest.approx(read_text(judge.model, text)[range(49), text[1:]].tolist(), abs=TOLERANCE)


def test_a_given_response_is_read_as_it_is(split_of: Callable[[str], InProcessEngine]) -> None:
    (given,) = random_prompts([30], seed=9)
    params = greedy(30, extra_args={FORCED_TOKEN_IDS: given} | ASKING)
    engine = split_of("leading")
    (output, _), _ = rounds_of(engine, [Arrival(BATCH[0], params), Arrival(BATCH[1], greedy(NUM_TOKENS))])
    assert list(output.outputs[0].token_ids) == given


def forbid_to_choose(worker: Any) -> None:
    """On all ranks but the first."""
    speculation = getattr(worker.model_runner, "speculation", None)
    if speculation is not None and worker.rank:
        speculation.lookahead.choose = None


def test_two_specialists_on_two_ranks_each_go_as_far_as_the_first_rank_says(
    tmp_path: Path, shared_groups: None
) -> None:
    """Each rank has a clock of its own, and drafts are worth something else by each."""
    path = write_tiny_fusion(tmp_path, names=("text", "code"), hidden_sizes=(64, 64))
    judge = Judge(UltraFuserForCausalLM.from_fusion(load_fusion(path)))
    batch = [random_prompts(lengths, seed) for seed, lengths in enumerate([(13, 36), (100, 7), (5, 90), (64, 1)])]
    options = {"exchange": "hidden", "tensor_parallel_size": 2, "speculation": {"min_tokens": 1, "max_tokens": 4}}
    with InProcessEngine(path, **(SPLIT | BUDGET_16 | options)) as engine:
        engine.llm.collective_rpc(forbid_to_choose)
        arrivals = [Arrival(own, greedy(NUM_TOKENS), step=2 * index) for index, own in enumerate(batch)]
        outputs, rounds = rounds_of(engine, arrivals)
    assert [list(own.outputs[0].token_ids) for own in outputs] == [judge.tokens(own, NUM_TOKENS) for own in batch]
    assert num_held([own for own in rounds if own.drafter == "leading"]) > 5
    assert len({own.num_drafts for own in rounds}) > 1
