"""The fused engine as the API and offline callers see it: vLLM's `AsyncLLM` and `LLMEngine`, fused.

Token ids in, token ids and text out; which worker, scheduler and input processor run is decided here.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import RequestOutput
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from ultrafuser.gating.model.fusion import FusionConfig, inspect_fusion
from ultrafuser.server.engine.client.input_processor import FusedInputProcessor
from ultrafuser.server.engine.client.mark_stream import Takeover, stream_marks
from ultrafuser.server.engine.client.nonfinite import raise_if_nan, raise_if_nonfinite
from ultrafuser.server.engine.client.step_feed import StepFeed
from ultrafuser.server.engine.shared.node import Node, engine_config
from ultrafuser.server.engine.shared.options import engine_arguments
from ultrafuser.server.engine.shared.ray_cluster import RayPlacement
from ultrafuser.server.engine.shared.spec import EngineSpec


class FusedAsyncLLM(AsyncLLM):
    """One vLLM engine that serves n specialists as one model.

    `generate` is vLLM's; its `prompt` may be an engine input that carries `specialist_prompts`: n lists of
    token ids, the longest of which is the `prompt_token_ids`. Without the key every specialist reads the same.
    Constraints of structured outputs are not looked at: the server has tried them out (`server/requests/grammars.py`).
    """

    input_processor: InputProcessor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.input_processor = FusedInputProcessor(self.input_processor, constraints_are_tried=True)
        stream_marks(self.output_processor)
        self.steps = StepFeed(self.output_processor, EngineSpec.from_vllm_config(self.vllm_config).names)

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        """As vLLM's; completions carry `gate_weights` and `drafted`, one row for each token, if `extra_args` asked.

        Raises:
            NonfiniteOutputError: a specialist or the gate computed NaN or infinity; the request has ended.
        """
        takeover = Takeover()
        prompt_logprobs = None
        async with aclosing(super().generate(*args, **kwargs)) as outputs:
            async for output in outputs:
                for completion in output.outputs:
                    raise_if_nonfinite(completion)
                    takeover.take(completion)
                # vLLM streams them with the first part of each response; merged into another's part they are lost.
                if output.prompt_logprobs and prompt_logprobs is None:
                    raise_if_nan(output.prompt_logprobs)
                prompt_logprobs = output.prompt_logprobs = output.prompt_logprobs or prompt_logprobs
                yield output

    async def _add_request(self, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, which keeps the state of a request that could not be sent: for ever unfinished."""
        try:
            await super()._add_request(request, *args, **kwargs)
        except BaseException:
            await self.abort(request.request_id, internal=True)
            raise

    @classmethod
    def from_fusion(
        cls,
        fusion: FusionConfig,
        engine_options: Mapping[str, Any] | None = None,
        node: Node | RayPlacement | None = None,
    ) -> "FusedAsyncLLM":
        """Start the engine of a materialized fusion; blocks until it can serve.

        `node` is this machine among several, the first of them; the others start `NodeWorkers`, or Ray starts theirs.

        Raises:
            FusionError, GateError: the fusion does not fit together; checked before any weight is loaded.
            EngineOptionError: an option is not on the allow-list.
        """
        args = AsyncEngineArgs(**engine_arguments(fusion, inspect_fusion(fusion), engine_options))
        engine = cls.from_vllm_config(
            engine_config(args, node),
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=args.enable_log_requests,
            disable_log_stats=args.disable_log_stats,
        )
        assert isinstance(engine, cls)
        return engine
