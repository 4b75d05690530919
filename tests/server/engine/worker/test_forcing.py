"""Given responses: the engine follows them exactly, and says of every token what the reference says."""

from collections.abc import Callable

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError

from tests.reference import read
from tests.server.engine.conftest import CONFIGURATIONS
from tests.server.engine.harness import Arrival, InProcessEngine, Prompts, greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.server.engine.shared.extra_args import FORCED_TOKEN_IDS, GATE_WEIGHTS

LENGTHS = [(13, 16, 36), (100, 20, 7), (1, 1, 60), (50, 50, 50), (5, 90, 33)]
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
GIVEN = [random_prompts([20], seed=70 + index)[0] for index in range(len(LENGTHS))]
TOLERANCE = 2e-4
"""Of log probabilities and weights: the tests of sampling hold logprobs to the same."""


def arrival(prompts: Prompts, given: list[int], step: int = 0) -> Arrival:
    extra = {FORCED_TOKEN_IDS: given, GATE_WEIGHTS: True}
    return Arrival(prompts, greedy(len(given), logprobs=0, extra_args=extra), step=step)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_engine_reads_a_given_response_as_the_reference_does(
    engine_of: Callable[[str], InProcessEngine], judge: Judge, configuration: str
) -> None:
    arrivals = [arrival(*own, step=index) for index, own in enumerate(zip(BATCH, GIVEN, strict=True))]
    outputs = engine_of(configuration).generate(arrivals)
    for prompts, given, output in zip(BATCH, GIVEN, outputs, strict=True):
        completion = output.outputs[0]
        assert list(completion.token_ids) == given
        logprobs_TV, weights_TS = read(judge.model, prompts, given)
        found = [own[token].logprob for own, token in zip(completion.logprobs, given, strict=True)]
        wanted = logprobs_TV[range(len(given)), given]
        np.testing.assert_allclose(found, wanted.numpy(), atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(completion.gate_weights, weights_TS.numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_sampled_neighbours_are_left_alone(
    engine_of: Callable[[str], InProcessEngine], judge: Judge, configuration: str
) -> None:
    arrivals = [arrival(BATCH[0], GIVEN[0]), Arrival(BATCH[1], greedy(20)), arrival(BATCH[2], GIVEN[2], step=2)]
    first, sampled, last = engine_of(configuration).tokens(arrivals)
    assert (first, last) == (GIVEN[0], GIVEN[2])
    assert sampled == judge.tokens(BATCH[1], 20)


def test_a_given_token_that_not_all_specialists_share_is_refused(engine: InProcessEngine) -> None:
    with pytest.raises(VLLMValidationError, match="outside the shared vocabulary"):
        engine.tokens([arrival(BATCH[0], [5, 320])])
