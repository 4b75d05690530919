"""An engine without a model: it checks requests as the real one does and answers with tokens from a script."""

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor

from ultrafuser.server.engine.client.input_processor import FusedInputProcessor
from ultrafuser.server.engine.shared.extra_args import forced_token_ids, wants_marks

SCRIPT = "Yes, it is."


class ScriptedEngine:
    """Answers `script`, token by token.

    `failure` is raised instead of token number `fails_at`; `errored` is what a dead engine reports; `prompts` are the
    engine inputs it has received, `num_aborted` counts the requests whose consumer left before the end;
    `num_unfinished` is how many it says it has in hand.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.script = SCRIPT
        self.model_config = vllm_config.model_config
        self.input_processor = FusedInputProcessor(InputProcessor(vllm_config))
        self.renderer = self.input_processor.renderer
        self.prompts: list[Any] = []
        self.params: list[SamplingParams] = []
        self.num_aborted = 0
        self.num_unfinished = 0
        self.errored = False
        self.failure: Exception | None = None
        self.fails_at = 0
        self.refusal: Exception | None = None

    @property
    def dead_error(self) -> Exception:
        """What is raised for requests to a dead engine."""
        return EngineDeadError()

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Raise the refusal that a test has set."""
        if self.refusal is not None:
            raise self.refusal

    def get_num_unfinished_requests(self) -> int:
        """As many as a test has set."""
        return self.num_unfinished

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **_: Any
    ) -> AsyncIterator[RequestOutput]:
        """The script's outputs for one prompt, cut at `max_tokens`."""
        self.prompts.append(prompt)
        self.params.append(sampling_params)
        self.input_processor.process_inputs(request_id, prompt, sampling_params, ("generate",))
        tokenizer = self.renderer.get_tokenizer()
        forced = forced_token_ids(sampling_params)
        complete = forced or tokenizer.encode(self.script, add_special_tokens=False)
        script = complete[: sampling_params.max_tokens]
        reason = "length" if len(script) < len(complete) else "stop"
        try:
            for step in range(len(script)):
                if self.failure is not None and step == self.fails_at:
                    raise self.failure
                if sampling_params.output_kind == RequestOutputKind.DELTA:
                    is_last = step + 1 == len(script)
                    yield self._output(request_id, prompt, sampling_params, [script[step]], reason if is_last else None)
            if sampling_params.output_kind != RequestOutputKind.DELTA:
                yield self._output(request_id, prompt, sampling_params, script, reason)
        except GeneratorExit:
            self.num_aborted += 1
            raise

    def _output(
        self, request_id: str, prompt: Any, params: SamplingParams, token_ids: list[int], reason: str | None
    ) -> RequestOutput:
        text = self.renderer.get_tokenizer().decode(token_ids)
        certain = [{token_id: Logprob(0.0, 1, "x")} for token_id in token_ids]
        logprobs: Any = None if params.num_logprobs is None else certain
        outputs = [
            CompletionOutput(index, text, token_ids, None, logprobs, finish_reason=reason) for index in range(params.n)
        ]
        for output in outputs if wants_marks(params) else ():
            output.gate_weights = np.full((len(token_ids), 3), 1 / 3)
            output.drafted = np.zeros(len(token_ids), dtype=bool)
        return RequestOutput(
            request_id, prompt.get("prompt"), prompt["prompt_token_ids"], None, outputs, reason is not None
        )
