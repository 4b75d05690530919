"""What requests say stays out of the engine's log."""

import pickle

from tests.server.engine.harness import InProcessEngine, engine_input, greedy, random_prompts
from ultrafuser.server.engine.shared.extra_args import FORCED_TOKEN_IDS, SPECIALIST_PROMPTS

PROMPTS = random_prompts((5, 6, 7), seed=0)


def test_the_log_of_a_failing_engine_has_no_prompt(engine: InProcessEngine) -> None:
    """vLLM writes the sampling parameters of all its requests, in which prompts travel, into the log."""
    params = greedy(2, extra_args={FORCED_TOKEN_IDS: [77, 78]})
    engine.llm.add_request("concealed", engine_input(PROMPTS), params)
    (request,) = engine.scheduler.requests.values()
    sent = pickle.loads(pickle.dumps(request.sampling_params))  # as workers get them
    assert sent.extra_args == {FORCED_TOKEN_IDS: [77, 78], SPECIALIST_PROMPTS: PROMPTS}
    for own in (request.sampling_params, sent):
        assert repr(own.extra_args) == f"{{'{FORCED_TOKEN_IDS}': <2 items>, '{SPECIALIST_PROMPTS}': <3 items>}}"
    while engine.llm.has_unfinished_requests():
        engine.llm.step()
