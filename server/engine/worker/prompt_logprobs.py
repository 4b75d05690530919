"""Log probabilities of the tokens of a prompt, from the fused distribution, taken while the prompt is read.

Stands in for the leader's own computation, which would ask the leader alone; chunks, preemption and the way out are
vLLM's as before. A position of a prompt means the same to all specialists only if they read the same prompt: requests
whose n prompts differ are refused where they enter (`client/input_processor.py`). Knows runners and rows, neither text
nor schedule.

Shapes: S specialists, T tokens of the step, B positions that are scored together, D hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ultrafuser.server.engine.worker.transfer import to_device

MAX_POSITIONS = 128
"""Positions scored at once. One position of three specialists takes about 3 MB at 150,000 ids, and nothing is set aside
for it: a whole chunk of 8,192 would not fit beside weights and cache."""

_LOGITS_MODES = ("raw_logits", "processed_logits")


class Scorer(Protocol):
    """Mixes rows, or gives them to who does."""

    def mix(self, hidden_SBD: Sequence[Tensor], logits_SBV: Sequence[Tensor]) -> Tensor | None:
        """Fused logits [B, V] of rows that all specialists have in the same order; None if another rank mixes."""


class PromptLogprobs:
    """What `GPUModelRunner._get_prompt_logprobs_dict` gives, for n specialists."""

    def __init__(self, runners: Sequence[GPUModelRunner], mixer: Scorer) -> None:
        """Have the leader, `runners[0]`, ask here; it does so at the end of a step, before the followers sample."""
        self._runners, self._leader = runners, runners[0]
        self._mixer = mixer
        self._leader._get_prompt_logprobs_dict = self.of_step

    def of_step(self, leader_TD: Tensor, num_scheduled: Mapping[str, int]) -> dict[str, LogprobsTensors]:
        """The tables of the prompts that are read to their end in this step.

        A table has a row for each token of the prompt but the first, which nothing predicts. vLLM keeps it with the
        request while the prompt is read in chunks.

        Args:
            leader_TD: the leader's hidden states of this step.
            num_scheduled: tokens that the leader computed for each request of the step.
        """
        wanted: dict[str, int] = self._leader.num_prompt_logprobs
        if not wanted:
            return {}
        complete = {}
        for request in [name for name in num_scheduled if name in wanted]:  # the plan's order, that of all ranks
            state = self._leader.requests[request]
            begin, end = state.num_computed_tokens, state.num_computed_tokens + num_scheduled[request]
            num_rows = len(state.prompt_token_ids) - 1
            table = state.in_progress_prompt_logprobs_cpu
            if table is None:
                table = LogprobsTensors.empty_cpu(num_rows, wanted[request] + 1)
                state.in_progress_prompt_logprobs_cpu = table
            self._fill(table, request, begin, min(end, num_rows), leader_TD)
            if end > num_rows:  # the last token of the prompt, with which the response begins
                complete[request] = table
        for request in complete:
            del wanted[request]
            self._leader.requests[request].in_progress_prompt_logprobs_cpu = None
        if complete:
            self._leader._sync_device()
        return complete

    def _fill(self, table: LogprobsTensors, request: str, begin: int, end: int, leader_TD: Tensor) -> None:
        """Score positions [begin, end) of a prompt, which this step computed from `begin` on."""
        hidden_STD = [leader_TD, *(runner.execute_model_state.hidden_states for runner in self._runners[1:])]
        firsts = [_first_row(runner, request) for runner in self._runners]
        prompt = self._leader.requests[request].prompt_token_ids
        for start in range(begin, end, MAX_POSITIONS):
            stop = min(start + MAX_POSITIONS, end)
            hidden_SBD = [
                own_TD[first + start - begin : first + stop - begin]
                for own_TD, first in zip(hidden_STD, firsts, strict=True)
            ]
            found = self._score(hidden_SBD, prompt[start + 1 : stop + 1], table.logprobs.shape[1] - 1)
            if found is None:
                continue
            for column, values in zip(table[:3], found[:3], strict=True):
                column[start:stop].copy_(values, non_blocking=True)

    def _score(self, hidden_SBD: Sequence[Tensor], targets: Sequence[int], num_top: int) -> LogprobsTensors | None:
        """The tokens that follow, and the most likely ones, at each of B positions; None if another rank scores."""
        pairs = zip(self._runners, hidden_SBD, strict=True)
        logits_SBV = [runner.model.compute_logits(hidden_BD) for runner, hidden_BD in pairs]
        scores_BV = self._mixer.mix(hidden_SBD, logits_SBV)
        if scores_BV is None:
            return None
        sampler = self._leader.sampler
        if self._leader.model_config.logprobs_mode not in _LOGITS_MODES:
            scores_BV = sampler.compute_logprobs(scores_BV)
        targets_B = to_device(targets, scores_BV.device)
        return sampler.gather_logprobs(scores_BV, num_top, targets_B)


def _first_row(runner: GPUModelRunner, request: str) -> int:
    """Where a request's tokens of this step begin in a runner's hidden states."""
    return int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request]])
