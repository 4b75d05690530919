"""vLLM's scheduler with exact prefix caching for n specialists, and with steps of bounded time.

A block may be shared only if every specialist has the same tokens in it, and may be announced as cached
only when every specialist has computed it. The rest of the schedule is vLLM's: it sees one canonical
prompt per request and knows nothing of specialists.

A request for which a specialist or the gate computed NaN or infinity ends here; no other is touched. Such values stay
in its KV blocks, so these must not be found again by their content, and must be zeroed before they hold another
request's: attention multiplies what it does not see by zero, and NaN stays NaN. A request may also leave, or be
preempted, before such a value is found: what no row has vouched for is zeroed, too.
"""

from collections.abc import Iterable
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from ultrafuser.server.engine.core.grammar_backend import use_one_backend
from ultrafuser.server.engine.core.hashing import fused_block_hasher, lag
from ultrafuser.server.engine.core.outputs import add_marks, add_report, nonfinite_end
from ultrafuser.server.engine.core.pacing import Pace
from ultrafuser.server.engine.shared.extra_args import conceal_tokens, specialist_prompts, wants_marks
from ultrafuser.server.engine.shared.spec import EngineSpec
from ultrafuser.server.engine.shared.step import StepRecord


class FusedSchedulerMixin(Scheduler):
    """Replaces how block hashes are made and when blocks are announced as cached; ends requests that went wrong; reads
    long prompts in pieces that fit into a bound of a step's time."""

    max_num_scheduled_tokens: int

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        use_one_backend(self.structured_output_manager, vllm_config)
        if self.num_spec_tokens:
            # As many drafts at any batch size; with such a table vLLM does not pad requests with drafts that are none.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.scheduler_config.max_num_seqs + 1)
            # A specialist that runs ahead writes keys and values of drafts before they are scheduled.
            self.num_lookahead_tokens = self.num_spec_tokens
        self._hash_fn = get_hash_fn_by_name(self.cache_config.prefix_caching_hash_algo)
        self._lags: dict[str, int] = {}
        self._wanting: set[str] = set()
        self._soiled_block_ids: set[int] = set()
        self._most_tokens = self.max_num_scheduled_tokens
        bound = EngineSpec.from_vllm_config(vllm_config).max_step_seconds
        is_bounded = bound > 0 and self.scheduler_config.enable_chunked_prefill
        self._pace = Pace(bound, self.max_num_scheduled_tokens, self.num_spec_tokens) if is_bounded else None
        coordinator = self.kv_cache_manager.coordinator
        announce = coordinator.cache_blocks
        coordinator.cache_blocks = lambda request, num_computed_tokens: announce(
            request, min(num_computed_tokens, request.num_tokens - self._lags[request.request_id])
        )

    def add_request(self, request: Request) -> None:
        """Queue a request, its blocks hashed over the prompts of all specialists."""
        assert request.prompt_token_ids is not None
        assert request.sampling_params is not None
        conceal_tokens(request.sampling_params)
        prompts = specialist_prompts(request.sampling_params) or [request.prompt_token_ids]
        num_canonical = len(request.prompt_token_ids)
        self._lags[request.request_id] = lag(num_canonical, min(len(prompt) for prompt in prompts))
        if self.cache_config.enable_prefix_caching:
            request._block_hasher = fused_block_hasher(prompts, num_canonical, self.hash_block_size, self._hash_fn)
            request.block_hashes = []
            request.update_block_hashes()
        if wants_marks(request.sampling_params):
            self._wanting.add(request.request_id)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As vLLM's, within limits that are set for each step."""
        if self.num_spec_tokens:
            self._leave_room_beside_drafts()
        if self._pace is None:
            return super().schedule(throttle_prefills)
        can_admit = bool(self.waiting) and len(self.running) < self.max_num_active_reqs
        limits = self._pace.limits(self.running, self.waiting.peek_request() if can_admit else None)
        self.max_num_scheduled_tokens = limits.num_tokens
        self.scheduler_config.long_prefill_token_threshold = limits.num_prompt_tokens
        output = super().schedule(throttle_prefills)
        self._pace.begin(output, self.requests)
        return output

    def _leave_room_beside_drafts(self) -> None:
        """Cut drafts, so that every decode gets its one token and prompts a quarter of the step: vLLM serves requests
        in their order, and the first ones' drafts could fill each step."""
        decodes = [request for request in self.running if not request.is_prefill_chunk]
        is_prompt_in_line = bool(self.waiting) or len(decodes) < len(self.running)
        room = self._most_tokens - (self._most_tokens // 4 if is_prompt_in_line else 0)
        longest = max(room // max(len(decodes), 1) - 1, 0)
        for request in decodes:
            request.spec_token_ids = request.spec_token_ids[:longest]

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As vLLM's; who asked gets marks of the tokens, requests that went wrong end, the step is reported."""
        if self._pace is not None:
            self._pace.end(scheduler_output)
        step: StepRecord | None = getattr(model_runner_output, "step", None)
        if step is None:
            return super().update_from_output(scheduler_output, model_runner_output)
        wanting = set(self._wanting)  # a request that ends with this token is forgotten in the next lines
        nonfinite = step.nonfinite
        ended = self._end_nonfinite(nonfinite) if nonfinite else []
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for own in outputs.values() if wanting else ():
            add_marks(own.outputs, step, wanting)
        for request in ended:
            own = outputs.setdefault(request.client_index, EngineCoreOutputs())
            own.outputs.append(nonfinite_end(request))
        add_report(outputs, step, [nonfinite[request.request_id] for request in ended])
        return outputs

    def _end_nonfinite(self, request_ids: Iterable[str]) -> list[Request]:
        """End requests before their tokens are handed out, as if they were aborted; those that still ran."""
        block_ids = {
            block_id
            for request in request_ids
            for group in self.kv_cache_manager.get_block_ids(request)
            for block_id in group
        }
        ended: list[Request] = self.finish_requests(request_ids, RequestStatus.FINISHED_ERROR)
        self._clean(block_ids)
        return ended

    def _clean(self, block_ids: set[int]) -> None:
        """Have freed blocks zeroed before they are used again, and not found again by their content."""
        self.kv_cache_manager.evict_blocks(block_ids)
        blocks = self.kv_cache_manager.block_pool.blocks
        self._soiled_block_ids |= {block_id for block_id in block_ids if blocks[block_id].ref_cnt == 0}

    def _get_new_block_ids_to_zero(self) -> list[int] | None:
        soiled, self._soiled_block_ids = self._soiled_block_ids, set()
        return [*(super()._get_new_block_ids_to_zero() or ()), *soiled] or None

    def _free_request_blocks(self, request: Request) -> None:
        unseen = self._unseen_blocks(request)
        super()._free_request_blocks(request)
        self._clean(unseen)

    def _unseen_blocks(self, request: Request) -> set[int]:
        """Blocks of which no row has shown yet that all in them is finite: the last ones, or of a prompt that is not
        read to its end all but those found in the cache. A step that is under way may still write to them."""
        if request.num_output_tokens:
            start = max(request.num_tokens - self._lags[request.request_id], 0)
        else:
            start = request.prefill_stats.num_cached_tokens if request.prefill_stats else 0
        groups = self.kv_cache_manager.get_block_ids(request.request_id)
        return {block_id for group in groups for block_id in group[start // self.block_size :]}

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self._lags.pop(request.request_id, None)
        self._wanting.discard(request.request_id)


class FusedScheduler(FusedSchedulerMixin, Scheduler):
    """Fused prefix caching over vLLM's synchronous scheduler."""


class FusedAsyncScheduler(FusedSchedulerMixin, AsyncScheduler):
    """Fused prefix caching over vLLM's asynchronous scheduler."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> FusedSchedulerMixin:
    """The fused scheduler for what vLLM made of async scheduling; vLLM calls this in the place of a class."""
    scheduler = FusedAsyncScheduler if vllm_config.scheduler_config.async_scheduling else FusedScheduler
    return scheduler(vllm_config, **kwargs)
