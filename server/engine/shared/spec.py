"""What workers and scheduler must know of a fused model, as plain JSON inside vLLM's `additional_config`.

Knows names, paths and numbers; opens no file.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from vllm.config import VllmConfig

from ultrafuser.gating.model.schema import SpeculationSettings

ADDITIONAL_CONFIG_KEY = "ultrafuser"
"""Our key in `VllmConfig.additional_config`, which vLLM carries to every worker."""


class SpecialistSpec(BaseModel):
    """One specialist as its model runner needs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Unique name; prefixes the specialist's layers in the common KV cache plan."""
    model: str
    """Folder or Hugging Face id of the weights, adapters already merged."""
    revision: str | None = None
    """Revision of a Hugging Face id."""
    dtype: str = "auto"
    """vLLM's name of the weights' dtype."""
    quantization: str | None = None
    """vLLM's name of the quantization method."""

    def engine_arguments(self) -> dict[str, Any]:
        """The fields that vLLM's `EngineArgs` have too: all but the name."""
        return self.model_dump(exclude={"name"})


class EngineSpec(BaseModel):
    """The fused model as workers and scheduler need it. The first specialist is the leader: its runner samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    specialists: tuple[SpecialistSpec, ...]
    """The n specialists in the fusion file's order."""
    gate: str | None
    """Path of the gate's safetensors file; None only for a single specialist."""
    hidden_sizes: tuple[int, ...]
    """Width of each specialist's last hidden state."""
    vocab_sizes: tuple[int, ...]
    """Rows of each specialist's output head; own prompts are checked against them."""
    num_shared_ids: int
    """Token ids below this number mean the same to all specialists; only they can be sampled."""
    exchange: Literal["logits", "hidden"] | None = None
    """What specialists with devices of their own send to the leader; None: all specialists are on every device."""
    speculation: SpeculationSettings | None = None
    """How tokens are guessed ahead; None: not at all."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a response; the first is the one EOS of the fused model."""
    max_whitespace: int | None
    """Most characters of white space between tokens of JSON in a structured output; None: any number."""
    max_step_seconds: float
    """Longest time of a step that reads a prompt; 0: no bound."""

    @property
    def names(self) -> list[str]:
        """The specialists' names, in order."""
        return [specialist.name for specialist in self.specialists]

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> "EngineSpec":
        """The spec that `to_additional_config` put into the configuration."""
        config: Any = vllm_config.additional_config
        return cls.model_validate(config[ADDITIONAL_CONFIG_KEY])

    def to_additional_config(self) -> dict[str, Any]:
        """The `additional_config` that carries this spec."""
        return {ADDITIONAL_CONFIG_KEY: self.model_dump(mode="json")}
