"""Which drafts hold: tokens are drawn one after the other by vLLM's own sampler, for as long as drafts agree.

A draft is a guess without a distribution, so "draw the next token, and go on while it is the draft" gives what decoding
without drafts gives: rejection sampling would accept as often. The j-th draw of a request sees what it would see if
the tokens before it had been handed out: penalties, masks, min_p, bias, seeds and log probabilities do as without
drafts, and a seeded generator is asked once for each token that is handed out. Knows rows and the sampler, not who
drafted.

Shapes: R requests of the leader's batch, N rows of logits (one for each request and one behind each draft), K tokens
that a request is given at most, V vocabulary.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ultrafuser.server.engine.worker.forcing import Forcing
from ultrafuser.server.engine.worker.transfer import to_device

NO_TOKEN = -1
"""What vLLM takes for no token where a request is given fewer than another."""


class Verifier:
    """Stands in the place of the leader's rejection sampler."""

    def __init__(self, leader: GPUModelRunner, forcing: Forcing) -> None:
        self._leader, self._sampler, self._forcing = leader, leader.sampler, forcing

    def __call__(
        self, drafts: SpecDecodeMetadata, draft_probs: None, logits_NV: Tensor, sampling: SamplingMetadata
    ) -> SamplerOutput:
        """Tokens [R, K], `NO_TOKEN` behind the first that is not the draft; log probabilities row by row."""
        if not any(drafts.num_draft_tokens):
            return self._sampler(logits=logits_NV, sampling_metadata=sampling)
        drafted = _by_request(drafts)
        if _is_plain_argmax(sampling) and not self._forcing.is_asked:
            return SamplerOutput(_agreed(self._sampler.greedy_sample(logits_NV), drafted), logprobs_tensors=None)
        return self._draw(drafted, logits_NV, sampling)

    def _draw(self, drafted: list[list[int]], logits_NV: Tensor, sampling: SamplingMetadata) -> SamplerOutput:
        """Draw for all requests at once; what is drawn for those whose draft was wrong before is thrown away."""
        # What penalties and limits of length look at; vLLM itself adds the step's tokens when it is over.
        outputs = sampling.output_token_ids or self._leader.input_batch.req_output_token_ids
        tokens: list[list[int]] = [[] for _ in drafted]
        tables: list[LogprobsTensors] = []
        going = list(range(len(drafted)))
        while going:
            drawn = self._draw_one(drafted, tokens, set(going), logits_NV, sampling)
            if drawn.logprobs_tensors is not None:
                tables.append(drawn.logprobs_tensors)
            token_ids = drawn.sampled_token_ids[:, 0].tolist()
            for slot in going:
                tokens[slot].append(token_ids[slot])
            going = [slot for slot in going if tokens[slot] == drafted[slot][: len(tokens[slot])]]
            for slot in going:
                outputs[slot].append(token_ids[slot])
            for processor in sampling.logitsprocs.all:
                processor.update_state(None)
        for slot, own in enumerate(tokens):
            if len(own) > 1:
                del outputs[slot][1 - len(own) :]
        return SamplerOutput(_padded(tokens, logits_NV.device), _interleaved(tables))

    def _draw_one(
        self,
        drafted: list[list[int]],
        tokens: list[list[int]],
        going: set[int],
        logits_NV: Tensor,
        sampling: SamplingMetadata,
    ) -> SamplerOutput:
        """The next token of every request, from the row behind the tokens it has so far."""
        first_rows = [0, *itertools.accumulate(1 + len(own) for own in drafted)]
        numbers = [
            row + min(len(own), len(drafts)) for row, own, drafts in zip(first_rows, tokens, drafted, strict=False)
        ]
        self._forcing.look_at(numbers)
        generators = {slot: own for slot, own in sampling.generators.items() if slot in going}
        rows_RV = logits_NV[to_device(numbers, logits_NV.device)]
        return self._sampler(logits=rows_RV, sampling_metadata=replace(sampling, generators=generators))


def verify_in(runners: Sequence[GPUModelRunner], forcing: Forcing) -> None:
    """Put ours in the place of vLLM's verification; `runners[0]` is the leader, followers are given its tokens."""
    leader = runners[0]
    _keep_logits_processors(leader)
    leader.rejection_sampler = Verifier(leader, forcing)
    for runner in runners:
        draft_to_the_end(runner)


def draft_to_the_end(runner: GPUModelRunner) -> None:
    """Near the end of the context vLLM would draft zeros for all requests; ours are left out one by one."""
    runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens + 1


def _keep_logits_processors(leader: GPUModelRunner) -> None:
    """Give the leader the processors that vLLM leaves out where there are drafts: its own verification lacks them."""
    config = copy.copy(leader.vllm_config)
    config.speculative_config = None
    batch = leader.input_batch
    batch.logitsprocs = build_logitsprocs(config, leader.device, False, False)
    batch.sampling_metadata = batch._make_sampling_metadata()


def _by_request(drafts: SpecDecodeMetadata) -> list[list[int]]:
    token_ids = iter(drafts.draft_token_ids.tolist())
    return [list(itertools.islice(token_ids, count)) for count in drafts.num_draft_tokens]


def _is_plain_argmax(sampling: SamplingMetadata) -> bool:
    """Whether every request takes the likeliest token as it is, and asks for nothing else."""
    changes = (
        not sampling.no_penalties,
        sampling.allowed_token_ids_mask is not None,
        sampling.bad_words_token_ids,
        sampling.max_num_logprobs is not None,
        sampling.logprob_token_ids,
        _has_budgets(sampling),
        *map(_changes_argmax, sampling.logitsprocs.non_argmax_invariant),
    )
    return sampling.all_greedy and not any(changes)


def _has_budgets(sampling: SamplingMetadata) -> bool:
    budgets = sampling.thinking_budget_state_holder
    return budgets is not None and budgets.has_tracked_requests()


def _changes_argmax(processor: LogitsProcessor) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return bool(processor.min_toks)
    return not isinstance(processor, LogitBiasLogitsProcessor) or bool(processor.biases)


def _agreed(best_N: Tensor, drafted: list[list[int]]) -> Tensor:
    """The tokens [R, K] up to the first that is not the draft, of the likeliest token of every row."""
    best, tokens = iter(best_N.tolist()), []
    for drafts in drafted:
        own = list(itertools.islice(best, 1 + len(drafts)))
        num_right = next((index for index, draft in enumerate(drafts) if draft != own[index]), len(drafts))
        tokens.append(own[: num_right + 1])
    return _padded(tokens, best_N.device)


def _padded(tokens: list[list[int]], device: torch.device) -> Tensor:
    width = max(map(len, tokens))
    rows = [[*own, *[NO_TOKEN] * (width - len(own))] for own in tokens]
    return to_device(rows, device, torch.int32)


def _interleaved(tables: list[LogprobsTensors]) -> LogprobsTensors | None:
    """Tables of R rows, one for each draw, as one of R times K rows."""
    if not tables:
        return None
    ids, logprobs, ranks = (torch.stack(own, dim=1).flatten(0, 1) for own in zip(*(t[:3] for t in tables), strict=True))
    if not len(ids):  # of the whole vocabulary vLLM gives log probabilities alone
        ids, ranks = logprobs.new_empty(len(logprobs), 0), logprobs.new_empty(len(logprobs), 0)
    return LogprobsTensors(ids, logprobs, ranks)
