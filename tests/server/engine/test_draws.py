"""Draws behind drafts: as often as the reference would draw, and drafts that share the sampler's noise hold."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from vllm import SamplingParams

from tests.fakes import write_tiny_fusion
from tests.reference import read
from tests.server.engine.conftest import DRAFTS
from tests.server.engine.harness import Arrival, InProcessEngine, random_prompts, serve
from tests.server.engine.judge import Judge
from ultrafuser.server.engine.worker import guessing
from ultrafuser.server.engine.worker.drafting import Drafter
from ultrafuser.server.engine.worker.lookahead import Ahead

NUM_DRAWS = 4096
DRAWN_FROM = random_prompts((13, 16, 36), seed=6)
PROMPTS = [random_prompts((13, 16, 36 + seed), seed) for seed in range(6)]


class SecondToken:
    """Guesses what follows a first token: for some the likeliest second one, for others the third likeliest."""

    def __init__(self, engine: InProcessEngine, likeliest: dict[int, list[int]]) -> None:
        self._requests, self._likeliest = engine.runner.leader.requests, likeliest
        self.num_drafted = 0

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """One guess a request, behind its first token."""
        outputs = {request: self._requests[request].output_token_ids for request in plan}
        firsts = {request: own[0] for request, own in outputs.items() if len(own) == 1}
        self.num_drafted += len(firsts)
        return {request: [self._likeliest[first][2 * (first % 2)]] for request, first in firsts.items()}


def test_tokens_behind_drafts_follow_the_fused_distribution(
    engine_of: Callable[[str], InProcessEngine], judge: Judge
) -> None:
    expected, likeliest = pairs_of(judge)
    engine = engine_of("drafts")
    drafter = SecondToken(engine, likeliest)
    drawn, _ = draw(engine, drafter, max_tokens=3, seed=77)
    assert drafter.num_drafted == NUM_DRAWS
    num_right = sum(drawn[first, seconds[2 * (first % 2)]] for first, seconds in likeliest.items())
    assert 0.2 * NUM_DRAWS < num_right < 0.8 * NUM_DRAWS, "some drafts hold, some do not"
    assert_drawn(drawn, expected)


def test_draws_without_a_seed_follow_it_though_drafts_share_their_noise(
    engine_of: Callable[[str], InProcessEngine], judge: Judge
) -> None:
    expected, _ = pairs_of(judge)
    engine = engine_of("drafts")
    torch.manual_seed(3)
    drawn, num_steps = draw(engine, engine.drafter, max_tokens=4)
    num_requests_at_once = engine.scheduler.max_num_running_reqs
    assert num_steps < 0.95 * 4 * NUM_DRAWS / num_requests_at_once, "many drafts hold"
    assert_drawn(drawn, expected)


def draw(engine: InProcessEngine, drafter: Drafter, **params: Any) -> tuple[Counter[tuple[int, int]], int]:
    """How often each pair of first tokens was drawn, each out of the four likeliest; and in how many steps."""
    sampling = SamplingParams(**{"temperature": 1.0, "top_k": 4, "ignore_eos": True, "n": NUM_DRAWS, **params})
    (output,), num_steps = serve(engine, drafter, [Arrival(DRAWN_FROM, sampling)])
    return Counter((own.token_ids[0], own.token_ids[1]) for own in output.outputs), num_steps


def pairs_of(judge: Judge) -> tuple[dict[tuple[int, int], float], dict[int, list[int]]]:
    """How often the reference would draw each of the sixteen pairs, and the likeliest second tokens by the first."""
    first_V = judge.generation(DRAWN_FROM, 1).logprobs[0]
    second_of = {int(first): read(judge.model, DRAWN_FROM, [int(first), 5])[0][1] for first in first_V.topk(4).indices}
    likeliest = {first: logprobs_V.topk(4).indices.tolist() for first, logprobs_V in second_of.items()}
    share_of_first = first_V[list(second_of)].double().softmax(dim=0).tolist()
    expected = {
        (first, second): NUM_DRAWS * share * own_share
        for (first, seconds), share in zip(likeliest.items(), share_of_first, strict=True)
        for second, own_share in zip(seconds, second_of[first][seconds].double().softmax(dim=0).tolist(), strict=True)
    }
    return expected, likeliest


def assert_drawn(drawn: Counter[tuple[int, int]], expected: dict[tuple[int, int], float]) -> None:
    """Nothing but these, and as often."""
    assert set(drawn) <= set(expected)
    assert chisquare([drawn[pair] for pair in expected], list(expected.values())).pvalue > 1e-3


@pytest.fixture(scope="module")
def one_leads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessEngine]:
    """An engine with drafts whose fused distribution is that of the specialist that drafts."""
    with InProcessEngine(write_tiny_fusion(tmp_path_factory.mktemp("closed"), gate="closed:code"), **DRAFTS) as engine:
        yield engine


NUM_OF_FULL_ROUNDS = 26
"""Tokens of an answer all of whose drafts hold: the first, and five in each of five rounds."""

SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "top_p": 0.6, "seed": 6},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 0.4, "min_p": 0.2},
    {"temperature": 0.0},
]


def test_drafts_are_drawn_as_the_sampler_draws(one_leads: InProcessEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guessing, "NUM_CANDIDATES", 320)  # all: else what they leave out could be drawn
    arrivals = [
        Arrival(prompts, SamplingParams(ignore_eos=True, max_tokens=NUM_OF_FULL_ROUNDS, **own))
        for prompts, own in zip(PROMPTS, SAMPLED, strict=True)
    ]
    _, num_steps = serve(one_leads, one_leads.drafter, arrivals)
    assert num_steps == 6


@pytest.mark.parametrize(
    ("name", "broken"),
    [("_next_seeds", lambda *_: [1, 2, 3, 4]), ("_is_foreseeable", lambda *_: False)],
    ids=["other noise", "the likeliest"],
)
def test_other_noise_is_noticed(
    one_leads: InProcessEngine, monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[..., Any]
) -> None:
    """The test above can fail."""
    monkeypatch.setattr(guessing, name, broken)
    params = SamplingParams(ignore_eos=True, max_tokens=NUM_OF_FULL_ROUNDS, temperature=1.0, seed=5)
    _, num_steps = serve(one_leads, one_leads.drafter, [Arrival(PROMPTS[0], params)])
    assert num_steps > 8
