"""Where requests enter the engine: the own prompts are checked here and put on their way.

vLLM validates only the canonical prompt, against the leader. This input processor checks all n, sets the
fused model's EOS, and refuses what is not fused, naming the field. It knows token ids, not text.
"""

from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from ultrafuser.server.engine.shared.constraint_kind import kind_and_text
from ultrafuser.server.engine.shared.extra_args import FORCED_TOKEN_IDS, SPECIALIST_PROMPTS, forced_token_ids
from ultrafuser.server.engine.shared.spec import EngineSpec
from ultrafuser.server.grammar.compiling import checked_grammar
from ultrafuser.server.grammar.errors import ConstraintError

UNSUPPORTED_PARAMS = ("prompt_logprob_token_ids", "trace_decode_token_ids")
"""Sampling parameters that read logits outside the fused decode step."""


class FusedInputProcessor(InputProcessor):
    """vLLM's input processor for a fused model."""

    def __init__(self, base: InputProcessor, *, constraints_are_tried: bool = False) -> None:
        """Take over from `base`, which the engine has made for the leader.

        `constraints_are_tried`: those of structured outputs have passed elsewhere, where they could be stopped.
        """
        super().__init__(base.vllm_config, base.renderer)
        self._constraints_are_tried = constraints_are_tried
        self._spec = EngineSpec.from_vllm_config(base.vllm_config)
        eos = self._spec.eos_token_ids
        # vLLM reads both when it completes sampling parameters: the file decides, not the leader's files.
        self.generation_config_fields = {"eos_token_id": list(eos)}
        self.renderer.get_eos_token_id = lambda: eos[0]
        # vLLM's own verification lacks min_p and logit_bias, so its checks refuse them where there are drafts.
        self.speculative_config = None

    def process_inputs(
        self, request_id: str, prompt: Any, params: SamplingParams | PoolingParams, *args: Any, **kwargs: Any
    ) -> EngineCoreRequest:
        """As vLLM's; `prompt` may carry `specialist_prompts`, n lists of token ids.

        Raises:
            VLLMValidationError: an own prompt is wrong, or a parameter is not fused; names the parameter.
        """
        if not isinstance(params, SamplingParams):
            raise VLLMValidationError("pooling is not fused; send a generation request", parameter="task")
        self._refuse_unsupported(prompt, params)
        own_prompts = prompt.get(SPECIALIST_PROMPTS) if isinstance(prompt, dict) else None
        request = super().process_inputs(request_id, prompt, params, *args, **kwargs)
        assert request.prompt_token_ids is not None
        assert request.sampling_params is not None
        self._check(own_prompts, request.prompt_token_ids)
        if params.prompt_logprobs is not None and own_prompts and any(own != own_prompts[0] for own in own_prompts):
            raise VLLMValidationError(
                "prompt_logprobs needs a prompt that all specialists read alike; send it raw, without a template",
                parameter="prompt_logprobs",
            )
        if own_prompts is not None:
            extra_args = dict(request.sampling_params.extra_args or {})
            request.sampling_params.extra_args = extra_args | {SPECIALIST_PROMPTS: own_prompts}
        return request

    def _validate_params(self, params: SamplingParams | PoolingParams, *args: Any) -> bool | None:
        # vLLM refuses what its way of compiling would not keep, and rewrites the caller's constraint.
        assert isinstance(params, SamplingParams)
        constraint, params.structured_outputs = params.structured_outputs, None
        try:
            if constraint is not None and not self._constraints_are_tried:
                self._check_constraint(constraint)
            return super()._validate_params(params, *args)
        finally:
            params.structured_outputs = constraint

    def _check_constraint(self, params: StructuredOutputsParams) -> None:
        try:
            checked_grammar(*kind_and_text(params), self._spec.max_whitespace)
        except (ConstraintError, MemoryError) as error:
            reason = str(error) or "the constraint needs too much memory"
            raise VLLMValidationError(f"structured_outputs: {reason}", parameter="structured_outputs") from None

    def _validate_model_input(self, prompt_input: Any, prompt_type: Any) -> None:
        # Only the length: vLLM would hold the canonical prompt, whoever's it is, against the leader's vocabulary.
        self._validate_prompt_len(len(prompt_input["prompt_token_ids"]), prompt_type)

    def _refuse_unsupported(self, prompt: Any, params: SamplingParams) -> None:
        for name in UNSUPPORTED_PARAMS:
            if getattr(params, name) is not None:
                raise VLLMValidationError(f"{name} is not supported: it is not fused yet", parameter=name)
        if SPECIALIST_PROMPTS in (params.extra_args or {}):
            raise VLLMValidationError(
                f"{SPECIALIST_PROMPTS} cannot be sent: the server renders the prompts; send messages instead",
                parameter=SPECIALIST_PROMPTS,
            )
        if isinstance(prompt, dict) and prompt.get("type", "token") != "token":
            raise VLLMValidationError("only text and token ids are fused, no embeddings or media", parameter="prompt")
        num_shared = self._spec.num_shared_ids
        if not all(0 <= token_id < num_shared for token_id in forced_token_ids(params) or ()):
            raise VLLMValidationError(
                f"a token id of the response lies outside the shared vocabulary, 0 to {num_shared - 1}",
                parameter=FORCED_TOKEN_IDS,
            )
        if params.allowed_token_ids and not all(0 <= i < num_shared for i in params.allowed_token_ids):
            raise VLLMValidationError(
                f"allowed_token_ids must lie in the shared vocabulary, 0 to {num_shared - 1}",
                parameter="allowed_token_ids",
            )

    def _check(self, own_prompts: Sequence[Sequence[int]] | None, canonical: Sequence[int]) -> None:
        specialists = self._spec.specialists
        if own_prompts is None:
            own_prompts = [canonical] * len(specialists)
        if len(own_prompts) != len(specialists):
            raise VLLMValidationError(
                f"{len(own_prompts)} specialist prompts for {len(specialists)} specialists", parameter="prompt"
            )
        if max(own_prompts, key=len) != list(canonical):
            raise VLLMValidationError("the longest specialist prompt must be the canonical one", parameter="prompt")
        for specialist, vocab_size, prompt in zip(specialists, self._spec.vocab_sizes, own_prompts, strict=True):
            if not prompt:
                raise VLLMValidationError(f"the prompt of specialist {specialist.name} is empty", parameter="prompt")
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                raise VLLMValidationError(
                    f"a token id of the prompt lies outside 0 to {vocab_size - 1}, "
                    f"the vocabulary of specialist {specialist.name}",
                    parameter="prompt",
                )
