"""One step where each specialist has ranks of its own: what differs from ranks that hold all specialists.

All ranks run at the same time. The leader's gather what the others send, mix and draw as ever, and tell the tokens as
soon as they are drawn; a follower's send, wait for the tokens and note them. Every rank finds the rows that end in a
token by itself, from the plan that all are given, and in the plan's order. Of a request with drafts these are several
rows, and it may be given as many tokens.

Shapes: B requests that end in a token, R requests of a runner's batch, K tokens that a request of the step can be given
at most.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.worker.exchange import Exchange
from ultrafuser.server.engine.worker.fused_step import FusedModelRunner, HalfStep
from ultrafuser.server.engine.worker.mixing import Mixer, Rows
from ultrafuser.server.engine.worker.sampling import give, in_order_of, no_tokens
from ultrafuser.server.engine.worker.specialists import Specialists, ending_rows, rows_of
from ultrafuser.server.engine.worker.speculation import Speculation
from ultrafuser.server.engine.worker.split_drafting import AskedDrafter
from ultrafuser.server.engine.worker.split_mixing import SendingMixer
from ultrafuser.server.engine.worker.timing import StepClock
from ultrafuser.server.engine.worker.verifying import NO_TOKEN, draft_to_the_end
from ultrafuser.server.engine.worker.warming import largest_step


class SplitLeader(FusedModelRunner):
    """The leading specialist's ranks."""

    def __init__(
        self,
        specialists: Specialists,
        load_mixer: Callable[[], Mixer],
        exchange: Exchange,
        speculation: Speculation | None,
    ) -> None:
        """As `FusedModelRunner`, of one specialist."""
        super().__init__(specialists, load_mixer, speculation)
        self._exchange = exchange
        self._drawn.then = self._tell
        self._awaited: Sequence[Row] = ()

    def _ending(self, rows_R: Sequence[Row], num_outputs: Mapping[str, int]) -> list[Row]:
        self._awaited = ending = in_plan_order(super()._ending(rows_R, num_outputs), num_outputs)
        return ending

    def _tell(self, token_ids_RK: Tensor) -> None:
        if self._awaited:
            tokens_BK = in_order_of(self._awaited, token_ids_RK, self._awaited).to(torch.int32)
            missing = _most_tokens(self._awaited) - tokens_BK.shape[1]
            self._exchange.tell(nn.functional.pad(tokens_BK, (0, missing), value=NO_TOKEN))


class SplitFollower(HalfStep[SendingMixer]):
    """The ranks of another specialist."""

    def __init__(
        self,
        specialists: Specialists,
        load_mixer: Callable[[], SendingMixer],
        exchange: Exchange,
        drafter: AskedDrafter | None,
    ) -> None:
        """As `HalfStep`, of one specialist; with a `drafter` it guesses tokens ahead when it is asked to."""
        super().__init__(specialists, load_mixer)
        self._exchange, self._drafter = exchange, drafter
        (self._runner,), (self._name,) = specialists.runners, specialists.names
        draft_to_the_end(self._runner)

    def profile_run(self, *args: object, **kwargs: object) -> None:
        """Run with the largest batch, then give the leader its part of the largest step."""
        self.specialists.profile_run(*args, **kwargs)
        (own,) = largest_step(self.runners)
        self._mixer.send(own, own.rows, StepClock(self._runner.device))
        self._mixer.forget({row.request for row in own.rows})

    def execute_model(
        self, scheduler_output: SchedulerOutput, intermediate_tensors: None = None
    ) -> ModelRunnerOutput | None:
        """As `HalfStep`; what the leader is asked of prompts is asked of this specialist, too."""
        for new in scheduler_output.scheduled_new_reqs:
            if new.sampling_params is not None and new.sampling_params.prompt_logprobs is not None:
                self._runner.num_prompt_logprobs[new.req_id] = 0  # no more than the prompt's own: the leader has them
        return super().execute_model(scheduler_output, intermediate_tensors)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        """The second half: send, be told, note, draft; the output is nobody's."""
        assert self._num_outputs is not None, "sample_tokens() must follow execute_model()"
        num_outputs, self._num_outputs = self._num_outputs, None
        rows_R = rows_of(self._runner, num_outputs)
        ending = in_plan_order(ending_rows(self._runner, rows_R), num_outputs)
        if ending:
            give(self._runner, in_order_of(rows_R, self._exchanged(rows_R, ending), _as_told(ending)))
        elif rows_R:
            give(self._runner, no_tokens(self._runner))
        if self._drafter is not None:
            self._drafter.answer()
        return ModelRunnerOutput(req_ids=[], req_id_to_index={}, sampled_token_ids=[])

    def _exchanged(self, rows_R: Sequence[Row], ending: Sequence[Row]) -> Tensor:
        """The tokens [B, K] of the requests that end in one, in the plan's order; `NO_TOKEN` behind the last."""
        state = self._runner.execute_model_state
        with self._clock.measure("idle", self._name):
            self._mixer.send(Rows(rows_R, state.sample_hidden_states, state.logits), ending, self._clock)
            shape = (len(_as_told(ending)), _most_tokens(ending))
            return self._exchange.tell(torch.empty(shape, dtype=torch.int32, device=self._runner.device))


def in_plan_order(rows: Sequence[Row], num_outputs: Mapping[str, int]) -> list[Row]:
    """Rows in the order of the scheduler's plan, by position: `num_outputs` has every scheduled request in order."""
    place_of = {request: place for place, request in enumerate(num_outputs)}
    return sorted(rows, key=lambda row: (place_of[row.request], row.position))


def _as_told(ending: Sequence[Row]) -> list[Row]:
    """A row of each request, with its place among the tokens that are told."""
    return [row._replace(slot=place) for place, row in enumerate(row for row in ending if not row.is_draft)]


def _most_tokens(ending: Sequence[Row]) -> int:
    """How many tokens one of these requests can be given: one more than the drafts of that with most."""
    return max(Counter(row.request for row in ending).values())
