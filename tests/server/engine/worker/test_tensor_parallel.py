"""Two tensor-parallel ranks, each with a shard of every specialist: exact, and never apart."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.reference import read_text
from tests.server.engine.harness import Arrival, InProcessEngine, engine_input, greedy, random_prompts
from tests.server.engine.judge import Judge

BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate([(13, 16, 36), (100, 20, 7), (1, 1, 60)])]


@pytest.fixture(scope="module", params=[{"max_tokens": 0}, {"min_tokens": 1, "max_tokens": 4}])
def two_ranks(tiny_fusion: Path, request: pytest.FixtureRequest) -> Iterator[InProcessEngine]:
    """The tiny fusion over two processes, one core each, with a 16-token prefill budget; without drafts, and with as
    many as each step finds worth it, but always with some."""
    options: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    options |= {"speculation": request.param}
    with InProcessEngine(tiny_fusion, **options, max_num_batched_tokens=16, max_num_seqs=8) as engine:
        yield engine


def outputs_by_specialist(worker: Any) -> list[dict[str, list[int]]]:
    """What each specialist's runner of one rank has noted as generated, by request."""
    return [
        {req_id: list(state.output_token_ids) for req_id, state in runner.requests.items()}
        for runner in worker.model_runner.runners
    ]


def test_two_ranks_equal_the_reference(two_ranks: InProcessEngine, judge: Judge) -> None:
    arrivals = [Arrival(prompts, greedy(20), step=i) for i, prompts in enumerate(BATCH)]
    two_ranks.reports.clear()
    assert two_ranks.tokens(arrivals) == [judge.tokens(prompts, 20) for prompts in BATCH]
    assert sum(len(report.weights_TS) for report in two_ranks.reports) == 60, "one rank reports"


def test_two_ranks_score_a_prompt_as_the_reference_does(two_ranks: InProcessEngine, judge: Judge) -> None:
    (text,) = random_prompts([50], seed=30)
    arrivals = [Arrival(BATCH[0], greedy(8)), Arrival([text] * 3, greedy(1, prompt_logprobs=0))]
    _, output = two_ranks.generate(arrivals)
    assert output.prompt_logprobs is not None
    entries = zip(output.prompt_logprobs[1:], text[1:], strict=True)
    found = [own[token].logprob for own, token in entries if own is not None]
    wanted = read_text(judge.model, text)[range(49), text[1:]]
    assert found == pytest.approx(wanted.tolist(), abs=2e-4)


def test_ranks_do_not_drift_over_500_unseeded_draws(two_ranks: InProcessEngine) -> None:
    params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=500)
    two_ranks.llm.add_request("drift", engine_input(BATCH[0]), params)
    seen: list[int] = []
    while len(seen) < 490:  # and before the last step, after which all is forgotten
        for output in two_ranks.llm.step():
            seen = list(output.outputs[0].token_ids)
    ranks = two_ranks.llm.collective_rpc(outputs_by_specialist)
    noted = [next(iter(specialist.values())) for rank in ranks for specialist in rank]
    assert noted == [seen] * 6  # two ranks, three specialists
    assert len(set(seen)) > 20
    while two_ranks.llm.has_unfinished_requests():
        two_ranks.llm.step()
