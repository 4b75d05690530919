"""Offline inference with a fused model, in the manner of vLLM's `LLM`; no server, no HTTP."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm import LLM
from vllm.inputs import EngineInput, tokens_input
from vllm.v1.engine.input_processor import InputProcessor

from gating.model.fusion import FusionConfig, inspect_fusion, load_fusion
from gating.model.materialize import materialize
from server.engine.client.input_processor import FusedInputProcessor
from server.engine.client.step_feed import StepFeed
from server.engine.client.weight_stream import Takeover
from server.engine.shared.extra_args import SPECIALIST_PROMPTS
from server.engine.shared.options import engine_arguments
from server.serving.rendering import FusedRenderer


class FusedLLM(LLM):
    """vLLM's `LLM` for a fusion file: `generate` and `chat` take what vLLM's take.

    A prompt may also be a mapping `{"specialist_prompts": [[...], ...]}` with one list of token ids per
    specialist. Text and plain token ids are the same for all specialists. With `extra_args={"gate_weights": True}` in
    the sampling parameters, completions have `gate_weights`: float32 [tokens, specialists].
    """

    input_processor: InputProcessor

    def __init__(self, fusion: str | Path | FusionConfig, **engine_options: Any) -> None:
        """Load a fusion file (path or preset) or a `FusionConfig`; `engine_options` as in vLLM's `EngineArgs`.

        Raises:
            FusionError, GateError: the fusion does not fit together.
            EngineOptionError: an option is not supported with fused models.
        """
        config = materialize(fusion if isinstance(fusion, FusionConfig) else load_fusion(fusion))
        info = inspect_fusion(config)
        super().__init__(**engine_arguments(config, info, engine_options))
        self.renderer = FusedRenderer(self.llm_engine.vllm_config, config, info)
        self.input_processor = FusedInputProcessor(self.input_processor)
        self.llm_engine.input_processor = self.input_processor
        self.steps = StepFeed(self.llm_engine.output_processor, config.specialist_names)

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


def fused_input(prompts: list[list[int]]) -> EngineInput:
    """An engine input from one prompt of token ids per specialist; the longest is canonical."""
    return {**tokens_input(max(prompts, key=len)), SPECIALIST_PROMPTS: prompts}
