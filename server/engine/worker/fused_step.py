"""One step of the fused model: translate the schedule, run n specialists, mix, draw once, hand the tokens out.

Runner 0, the leader, draws with vLLM's own sampler; the others get its tokens. Knows the order of things; each of them
has a module of its own. A vLLM worker holds the object here as its `model_runner`, and finds the specialists behind it.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.worker.forcing import Forcing, given_tokens
from ultrafuser.server.engine.worker.mixing import Mixer, Rows
from ultrafuser.server.engine.worker.output import StepOnTheWay, completed
from ultrafuser.server.engine.worker.prompt_logprobs import PromptLogprobs, Scorer
from ultrafuser.server.engine.worker.sampling import LeaderDraw, give, in_order_of, no_tokens
from ultrafuser.server.engine.worker.specialists import Specialists, ending_rows, rows_of, unfinished_slots
from ultrafuser.server.engine.worker.speculation import Speculation
from ultrafuser.server.engine.worker.thinking_budget import keep_budgets_in
from ultrafuser.server.engine.worker.timing import StepClock
from ultrafuser.server.engine.worker.verifying import verify_in
from ultrafuser.server.engine.worker.view import SpecialistView, scheduled_requests
from ultrafuser.server.engine.worker.warming import largest_step


class StepMixer(Scorer, Protocol):
    """Mixes a step's rows, or gives them to who does."""

    @property
    def num_bytes(self) -> int:
        """Of memory beside the gate."""

    def forget(self, requests: Iterable[str]) -> None:
        """Drop what the gate remembers of requests that have ended."""


M = TypeVar("M", bound=StepMixer)


class HalfStep(Generic[M]):
    """The first half of a step, the same on every rank: translate the schedule and run; nothing is drawn yet.

    What is not a step's is asked of `Specialists`. M mixes, or sends to where it is done.
    """

    def __init__(self, specialists: Specialists, load_mixer: Callable[[], M]) -> None:
        """`load_mixer` is called once the weights are loaded."""
        self.specialists = specialists
        self._load_mixer = load_mixer
        self._views = [SpecialistView(index) for index in specialists.indices]
        self._clock = StepClock(self.leader.device)
        self._num_outputs: dict[str, int] | None = None
        """Output tokens so far of the requests whose step is between its two halves."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["specialists"], name)

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Load every specialist's weights, then the gate."""
        self.specialists.load_model(load_dummy_weights)
        self._mixer = self._load_mixer()
        self._prompt_logprobs = PromptLogprobs(self.runners, self._mixer)

    @property
    def model_memory_usage(self) -> int:
        """Bytes of weights, and of what is allocated with them: what vLLM's memory profiling does not see itself."""
        return self.specialists.model_memory_usage + self._mixer.num_bytes

    def execute_model(
        self, scheduler_output: SchedulerOutput, intermediate_tensors: None = None
    ) -> ModelRunnerOutput | None:
        """Returns vLLM's empty output if nothing is scheduled, or else None."""
        self._mixer.forget(scheduler_output.finished_req_ids)
        # One by one: a plan is made while the device runs the specialist before.
        plans = (view.translate(scheduler_output) for view in self._views)
        idle = self.specialists.forward(plans, self._clock)
        if scheduler_output.total_num_scheduled_tokens == 0:
            return idle
        self._num_outputs = {request: num_outputs for request, _, num_outputs in scheduled_requests(scheduler_output)}
        return None


class FusedModelRunner(HalfStep[Mixer]):
    """n specialists behind the interface of one model runner."""

    def __init__(
        self, specialists: Specialists, load_mixer: Callable[[], Mixer], speculation: Speculation | None = None
    ) -> None:
        """As `HalfStep`; with `speculation` tokens are guessed ahead."""
        super().__init__(specialists, load_mixer)
        self.speculation = speculation
        self._forcing = Forcing(self.leader.sampler)
        if speculation is not None:
            verify_in(self.specialists.runners, self._forcing)
        self._drawn = LeaderDraw(self.leader)

    @property
    def model_memory_usage(self) -> int:
        """As `HalfStep`; a trained head's, too."""
        return super().model_memory_usage + (0 if self.speculation is None else self.speculation.num_bytes)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Give every specialist its cache; vLLM may make the batches anew for it."""
        self.specialists.initialize_kv_cache(*args, **kwargs)
        keep_budgets_in(self.leader)

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """Run every specialist once with the largest batch, then mix and sample once with all their results held."""
        self.specialists.profile_run(*args, **kwargs)
        with set_current_vllm_config(self.leader.vllm_config):
            rows = largest_step(self.runners)
            mixed = self._mixer.fuse_into_leader(rows, rows[0].rows, StepClock(self.leader.device))
            self._mixer.forget({row.request for row in rows[0].rows})
            if self.speculation is not None and self.speculation.head is not None:
                self.speculation.head.rehearse(mixed.hidden_SBD)
            self.leader._dummy_sampler_run(rows[0].hidden_RD[: self.leader.max_num_reqs])
            self.leader._sync_device()

    def execute_model(
        self, scheduler_output: SchedulerOutput, intermediate_tensors: None = None
    ) -> ModelRunnerOutput | None:
        """As `HalfStep`; notes when the step began, and how many tokens are in it."""
        self._start = time.perf_counter()
        self._num_tokens = scheduler_output.total_num_scheduled_tokens
        return super().execute_model(scheduler_output, intermediate_tensors)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """The second half: mix, draw, hand out. The output names every scheduled request."""
        assert self._num_outputs is not None, "sample_tokens() must follow execute_model()"
        num_outputs, self._num_outputs = self._num_outputs, None
        rows_SR = [rows_of(runner, num_outputs) for runner in self.runners]
        ending = self._ending(rows_SR[0], num_outputs)
        marks_XB = self._mix(rows_SR, ending) if ending else None
        step = StepOnTheWay(ending, marks_XB, self._clock, self.speculation.decisions if self.speculation else {})
        output = self._draw(rows_SR[0], grammar_output)
        self._hand_out(rows_SR, ending)
        if self.speculation is not None:
            self.speculation.go_on(ending, marks_XB, self._seconds_if_only(len(ending)))
        return completed(output, list(num_outputs), step)

    def _ending(self, rows_R: Sequence[Row], num_outputs: Mapping[str, int]) -> list[Row]:
        """The leader's rows that end in a token."""
        return ending_rows(self.leader, rows_R)

    def _mix(self, rows_SR: list[list[Row]], ending: list[Row]) -> Tensor:
        """Put the fused logits in the place of the leader's; the marks [X, B]."""
        states = [runner.execute_model_state for runner in self.runners]
        specialists = [
            Rows(rows_R, state.sample_hidden_states, state.logits)
            for rows_R, state in zip(rows_SR, states, strict=True)
        ]
        mixed = self._mixer.fuse_into_leader(specialists, ending, self._clock)
        self.leader.execute_model_state = states[0]._replace(logits=mixed.logits_RV)
        if self.speculation is not None:
            self.speculation.see(mixed.hidden_SBD, mixed.marks_XB)
        return mixed.marks_XB

    def _draw(
        self, rows_R: list[Row], grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Have the leader sample; rows that end in no token must not advance their seeded generator.

        vLLM draws for such rows and rewinds the generator afterwards, which generators on the CPU refuse.
        """
        if not rows_R:
            return ModelRunnerOutput(req_ids=[], req_id_to_index={}, sampled_token_ids=[])
        self._forcing.set(given_tokens(rows_R, self.leader.requests))
        generators = self.leader.input_batch.generators
        held = {slot: generators.pop(slot) for slot in unfinished_slots(self.leader) if slot in generators}
        output = self.leader.sample_tokens(grammar_output)
        generators.update(held)
        return output

    def _hand_out(self, rows_SR: list[list[Row]], ending: list[Row]) -> None:
        """Give every follower the tokens; any where no row ends in one, which it throws away."""
        for follower, rows_R in zip(self.followers, rows_SR[1:], strict=True):
            if rows_R and ending:
                give(follower, in_order_of(rows_R, self._drawn.token_ids_RK, ending))
            elif rows_R:
                give(follower, no_tokens(follower))

    def _seconds_if_only(self, num_rows: int) -> float | None:
        """How long this step took so far; None if it computed more than so many rows, as where a prompt is read."""
        return time.perf_counter() - self._start if self._num_tokens == num_rows else None
