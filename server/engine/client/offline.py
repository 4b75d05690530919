"""vLLM's offline `LLM` over a fused engine: in one process with its caller, and no server.

Token ids and text in, token ids and text out; how messages become n prompts is the renderer's business, which the
caller brings.
"""

from collections.abc import Mapping
from typing import Any, Self

from vllm import LLM
from vllm.inputs import EngineInput
from vllm.v1.engine.input_processor import InputProcessor

from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.server.engine.client.input_processor import FusedInputProcessor
from ultrafuser.server.engine.client.mark_stream import Takeover
from ultrafuser.server.engine.client.step_feed import StepFeed
from ultrafuser.server.engine.shared.extra_args import SPECIALIST_PROMPTS, fused_input
from ultrafuser.server.engine.shared.options import check_devices, engine_arguments, override_engine


class OfflineEngine(LLM):
    """vLLM's `LLM`, fused: prompts may carry `specialist_prompts`, completions have `gate_weights` and `drafted`."""

    input_processor: InputProcessor

    def __init__(self, fusion: FusionConfig, info: FusedModelInfo, engine_options: Mapping[str, Any]) -> None:
        """Start the engine of a materialized fusion; raises what `engine_arguments` does."""
        check_devices(override_engine(fusion, engine_options))
        super().__init__(**engine_arguments(fusion, info, engine_options))
        self.input_processor = FusedInputProcessor(self.input_processor)
        self.llm_engine.input_processor = self.input_processor
        self.steps = StepFeed(self.llm_engine.output_processor, fusion.specialist_names)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """End the engine: when this returns its processes are gone and its memory is free; it answers nothing more."""
        for renderer in (self.renderer, self.llm_engine.renderer):
            renderer.shutdown()
        self.llm_engine.engine_core.shutdown()

    def _run_engine(self, *args: Any, **kwargs: Any) -> list[Any]:
        outputs = super()._run_engine(*args, **kwargs)
        for output in outputs:
            for completion in output.outputs:
                Takeover().take(completion)
        return outputs

    def _preprocess_cmpl_one(self, prompt: Any, *args: Any, **kwargs: Any) -> EngineInput:
        if isinstance(prompt, Mapping) and SPECIALIST_PROMPTS in prompt:
            return fused_input(prompt[SPECIALIST_PROMPTS])
        return super()._preprocess_cmpl_one(prompt, *args, **kwargs)
