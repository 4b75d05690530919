"""How many tokens a step may hold, so that it takes no longer than a bound: decodes first, then pieces of prompts.

vLLM's scheduler has two limits, which are set before each step: tokens in all, and tokens of one prompt. The second is
ignored when a request is alone, the first would be used up by a prompt that stands before a decode. Knows requests and
limits, not how a schedule is made.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from ultrafuser.server.engine.core.step_cost import StepCost, Work


class Limits(NamedTuple):
    """What vLLM's scheduler is told."""

    num_tokens: int
    """Tokens of the step."""

    num_prompt_tokens: int
    """Tokens of any one prompt, as long as there are other requests; 0: no limit."""


class _Step(NamedTuple):
    """A step that is under way."""

    work: Work
    num_prompt_tokens: int
    start_seconds: float


class Pace:
    """Measures steps from their schedule to their result, and sets the limits of the next."""

    def __init__(
        self,
        bound_seconds: float,
        max_tokens: int,
        num_drafts: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`max_tokens` is the scheduler's own limit, which holds as well; `num_drafts` those of a decode at most."""
        self._bound_seconds = bound_seconds
        self._max_tokens = max_tokens
        self._least_tokens = 1 + num_drafts
        self._clock = clock
        self._cost = StepCost()
        self._decoding: set[str] = set()
        self._under_way: deque[_Step] = deque()
        self._last_end = clock()

    def limits(self, running: Sequence[Request], next_in_line: Request | None) -> Limits:
        """The next step's, given the scheduler's requests in its order, and the one that it would admit next."""
        decodes = [request for request in running if not request.is_prefill_chunk]
        prompts = [request for request in running if request.is_prefill_chunk]
        self._decoding = {request.request_id for request in decodes}
        in_line = [*prompts, next_in_line] if next_in_line is not None else prompts
        if not in_line:
            return Limits(self._max_tokens, 0)
        work = sum((Work.span(request.num_computed_tokens, _num_needed(request)) for request in decodes), Work())
        # Where one begins that was not admitted is known when the cache was asked; its last token costs most.
        start = max((request.num_computed_tokens for request in prompts), default=in_line[0].num_tokens)
        chunk = self._cost.chunk(self._bound_seconds, work, start)
        num_before_decodes = _num_prompts_before_the_last_decode(running)
        # The limit of a prompt is that of a decode, too.
        share = max(self._least_tokens, min(chunk // max(1, num_before_decodes), _share_of_the_first(chunk, in_line)))
        num_tokens = work.num_tokens + max(chunk, num_before_decodes * share)
        return Limits(min(num_tokens, self._max_tokens), share)

    def begin(self, output: SchedulerOutput, requests: Mapping[str, Request]) -> None:
        """A step is scheduled."""
        if not output.total_num_scheduled_tokens:
            return
        work, num_prompt_tokens = Work(), 0
        for name, num_tokens in output.num_scheduled_tokens.items():
            work += Work.span(requests[name].num_computed_tokens - num_tokens, num_tokens)  # computed: as if it were
            num_prompt_tokens += 0 if name in self._decoding else num_tokens
        self._under_way.append(_Step(work, num_prompt_tokens, self._clock()))

    def end(self, output: SchedulerOutput) -> None:
        """The result of the step that was scheduled first is there."""
        if not output.total_num_scheduled_tokens:
            return
        step, now = self._under_way.popleft(), self._clock()
        # A step that was scheduled ahead begins when the one before it ends.
        seconds = now - max(step.start_seconds, self._last_end)
        self._last_end = now
        self._cost.learn(step.work, step.num_prompt_tokens, seconds)


def _num_needed(request: Request) -> int:
    """Tokens that a request which decodes computes next: one, and its drafts."""
    return request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens


def _num_prompts_before_the_last_decode(running: Sequence[Request]) -> int:
    """How many prompts take their tokens before all decodes have theirs."""
    last = max((index for index, request in enumerate(running) if not request.is_prefill_chunk), default=0)
    return sum(request.is_prefill_chunk for request in running[:last])


def _share_of_the_first(chunk: int, in_line: Sequence[Request]) -> int:
    """All, or three quarters if a shorter prompt comes behind: a question must not wait for a book to be read."""
    first, *others = (request.num_tokens - request.num_computed_tokens for request in in_line)
    return chunk - max(chunk // 4, 1) if any(other < first for other in others) else chunk
