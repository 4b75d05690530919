"""The scheduler's plan as one specialist sees it.

vLLM's scheduler knows one *canonical* prompt per request, the longest of the specialists' renderings. A
specialist whose own prompt is shorter computes fewer positions. This module translates; it computes no
tensors and knows nothing of gates, logits or sampling.

Let L be the canonical prompt length, l the specialist's own, k the output tokens so far, T = L + k and
t = l + k. Positions are the specialist's own: its token p sits in slot p of the request's block table.
"""

from dataclasses import dataclass, field, replace

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from ultrafuser.server.engine.shared.extra_args import specialist_prompts

BlockIds = tuple[list[int], ...]
"""Block ids of a request, one list per KV cache group."""


def own_span(start: int, end: int, num_canonical: int, num_own: int) -> tuple[int, int]:
    """The positions a specialist computes for the scheduled canonical span [start, end).

    `num_canonical` is T and `num_own` is t, both in tokens and with outputs. The last own token is always
    computed in the step in which the canonical sequence ends (end == T), so that all specialists deliver
    their logits in the same step. An empty span (start == end) means: not scheduled in this step.
    """
    if end == num_canonical:
        return min(start, num_own - 1), num_own
    return min(start, num_own - 1), min(end, num_own - 1)


@dataclass
class _Request:
    """What one specialist's runner has been told about a request, and what it has not."""

    announcement: NewRequestData
    """The request as the scheduler announced it; the source of prompt and sampling parameters."""
    own_prompt: list[int]
    num_canonical_prompt: int
    block_ids: BlockIds
    """Every block the request holds now."""
    untold: BlockIds
    """Blocks given since the runner was last told of the request."""
    announced: bool = False
    """Whether the runner knows the request."""
    replaced: bool = False
    """Whether the block list was replaced (preemption) since the runner was last told of it."""
    outputs: list[int] = field(default_factory=list)
    """Output tokens as of the last resume; sent again whenever the request is announced again."""


class SpecialistView:
    """Translates the scheduler's outputs into those of one specialist, step by step.

    Keeps what the specialist's runner has been told, because a request with an empty span is not scheduled
    for the specialist: a new request is announced at its first non-empty span with all blocks given so far.
    Every output passes fresh lists, since the runner extends `block_ids` in place.
    """

    def __init__(self, index: int) -> None:
        """`index` is the specialist's place in the fusion file; the first, the leader, gets what users sent."""
        self.index = index
        self._requests: dict[str, _Request] = {}
        self._in_batch: set[str] = set()

    def translate(self, output: SchedulerOutput) -> SchedulerOutput:
        """One step's plan for this specialist; the scheduler's own object is left as it is."""
        for req_id in output.finished_req_ids:
            self._requests.pop(req_id, None)
        for new in output.scheduled_new_reqs:
            self._add(new)
        cached = output.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            self._update(req_id, cached, i)
        return self._plan(output)

    def _add(self, new: NewRequestData) -> None:
        assert new.prompt_token_ids is not None
        assert new.sampling_params is not None
        prompts = specialist_prompts(new.sampling_params)
        self._requests[new.req_id] = _Request(
            announcement=new,
            own_prompt=list(prompts[self.index] if prompts else new.prompt_token_ids),
            num_canonical_prompt=len(new.prompt_token_ids),
            block_ids=_copy(new.block_ids),
            untold=tuple([] for _ in new.block_ids),
        )

    def _update(self, req_id: str, cached: CachedRequestData, i: int) -> None:
        request = self._requests[req_id]
        if req_id in cached.all_token_ids:
            request.outputs = cached.all_token_ids[req_id][request.num_canonical_prompt :]
        new_block_ids = cached.new_block_ids[i]
        if req_id in cached.resumed_req_ids:
            assert new_block_ids is not None
            request.block_ids, request.replaced = _copy(new_block_ids), True
            request.untold = tuple([] for _ in new_block_ids)
        elif new_block_ids is not None:
            for held, untold, given in zip(request.block_ids, request.untold, new_block_ids, strict=True):
                held.extend(given)
                untold.extend(given)

    def _plan(self, output: SchedulerOutput) -> SchedulerOutput:
        new_reqs: list[NewRequestData] = []
        cached = CachedRequestData.make_empty()
        num_scheduled: dict[str, int] = {}
        own_drafts: dict[str, list[int]] = {}
        for req_id, start, num_outputs in scheduled_requests(output):
            request = self._requests[req_id]
            drafts = output.scheduled_spec_decode_tokens.get(req_id, [])
            own_start, own_end = own_span(
                start,
                start + output.num_scheduled_tokens[req_id] - len(drafts),
                request.num_canonical_prompt + num_outputs,
                len(request.own_prompt) + num_outputs,
            )
            if own_start == own_end:
                continue
            if drafts:  # they follow the last token, which is in the span, for all alike
                own_drafts[req_id] = list(drafts)
            num_scheduled[req_id] = own_end + len(drafts) - own_start
            if request.announced:
                self._continue(cached, req_id, request, own_start, num_outputs)
            else:
                new_reqs.append(self._announce(request, own_start))
            request.announced, request.replaced = True, False
            request.untold = tuple([] for _ in request.block_ids)
        self._in_batch = set(num_scheduled)
        return replace(
            output,
            scheduled_new_reqs=new_reqs,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=num_scheduled,
            scheduled_spec_decode_tokens=own_drafts,
            total_num_scheduled_tokens=sum(num_scheduled.values()),
            finished_req_ids=set(output.finished_req_ids),
        )

    def _announce(self, request: _Request, own_start: int) -> NewRequestData:
        return replace(
            request.announcement,
            prompt_token_ids=list(request.own_prompt),
            # A follower's are neutral, greedy without seed and penalties: it never draws a random number.
            sampling_params=SamplingParams(temperature=0.0) if self.index else request.announcement.sampling_params,
            block_ids=_copy(request.block_ids),
            num_computed_tokens=own_start,
        )

    def _continue(
        self, cached: CachedRequestData, req_id: str, request: _Request, own_start: int, num_outputs: int
    ) -> None:
        cached.req_ids.append(req_id)
        if request.replaced:
            cached.resumed_req_ids.add(req_id)
            cached.new_block_ids.append(_copy(request.block_ids))
        else:
            cached.new_block_ids.append(_copy(request.untold) if any(request.untold) else None)
        if req_id not in self._in_batch:
            # The runner recovers outputs from here when it runs ahead of the scheduler (async scheduling).
            cached.all_token_ids[req_id] = request.own_prompt + request.outputs
        cached.num_computed_tokens.append(own_start)
        cached.num_output_tokens.append(num_outputs)


def _copy(block_ids: BlockIds) -> BlockIds:
    return tuple(list(ids) for ids in block_ids)


def scheduled_requests(output: SchedulerOutput) -> list[tuple[str, int, int]]:
    """(request id, first canonical position, output tokens so far) of each scheduled request, in order."""
    state = {new.req_id: (new.num_computed_tokens, 0) for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    for req_id, start, num_outputs in zip(
        cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
    ):
        state[req_id] = (start, num_outputs)
    return [(req_id, *state[req_id]) for req_id in output.num_scheduled_tokens]
