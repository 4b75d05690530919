"""Offline inference with a fused model, in the manner of vLLM's `LLM`; no server, no HTTP."""

from pathlib import Path
from typing import Any

from ultrafuser.gating.model.fusion import FusionConfig, inspect_fusion, load_fusion
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.server.engine.client.offline import OfflineEngine
from ultrafuser.server.serving.rendering import FusedRenderer


class FusedLLM(OfflineEngine):
    """vLLM's `LLM` for a fusion file: `generate` and `chat` take what vLLM's take.

    A prompt may also be a mapping `{"specialist_prompts": [[...], ...]}` with one list of token ids per
    specialist. Text and plain token ids are the same for all specialists. With `extra_args={"gate_weights": True}` in
    the sampling parameters, completions have `gate_weights`: float32 [tokens, specialists]; and with `drafted`, or
    either of the two, `drafted`: bool [tokens], which of them were guessed ahead.

    Used in a `with` statement, or ended by `shutdown`, it gives its processes and its cache back.
    """

    def __init__(self, fusion: str | Path | FusionConfig, **engine_options: Any) -> None:
        """Load a fusion file (path or preset) or a `FusionConfig`; `engine_options` as in vLLM's `EngineArgs`.

        Raises:
            FusionError, GateError: the fusion does not fit together.
            EngineOptionError: an option is not supported with fused models.
        """
        config = materialize(fusion if isinstance(fusion, FusionConfig) else load_fusion(fusion))
        info = inspect_fusion(config)
        super().__init__(config, info, engine_options)
        self.renderer = FusedRenderer(self.llm_engine.vllm_config, config, info)
