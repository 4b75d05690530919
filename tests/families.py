"""Tiny random models of today's architectures, and fusions of them on disk, beside those of `tests/fakes.py`.

- Windows are a fraction of the prompts that tests use: a window that is lost, or another specialist's, is found out.
- The models of a fusion share one vocabulary, and none has ids of its own.
- Output rows of tokens that are no printable text are not cleared; greedy tokens vary over all ids.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from tests.fakes import BOS_ID, EOS_ID, LOGIT_STD, MAX_POSITIONS, PAD_ID, TEMPLATES, build_gate, build_tokenizer
from ultrafuser.gating.model.gate_file import save_gate

VOCAB_SIZE = 320
SLIDING, FULL = "sliding_attention", "full_attention"

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "tie_word_embeddings": False,
}


def llama(**changes: Any) -> PreTrainedConfig:
    """Full attention in every layer."""
    return LlamaConfig(**_SHAPE | changes)


def mistral(window: int = 12, **changes: Any) -> PreTrainedConfig:
    """Every layer slides, and only the model says so, not its layers."""
    return MistralConfig(**_SHAPE | {"sliding_window": window} | changes)


def gemma3(window: int = 16, **changes: Any) -> PreTrainedConfig:
    """Layers that slide and a full one, with rotations of their own; tied embeddings; norms before and after."""
    layers = {"num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL], "tie_word_embeddings": True}
    return Gemma3TextConfig(**_SHAPE | layers | {"sliding_window": window, "query_pre_attn_scalar": 32} | changes)


def gemma3_with_vision(window: int = 16) -> PreTrainedConfig:
    """The same behind a small vision tower."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3Config(
        text_config=gemma3(window).to_dict(),
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=VOCAB_SIZE - 1,
    )


def olmo3(window: int = 24, **changes: Any) -> PreTrainedConfig:
    """Layers that slide and a full one; norms after."""
    layers = {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]}
    return Olmo3Config(**_SHAPE | layers | {"sliding_window": window, "num_attention_heads": 2} | changes)


def gpt_oss(window: int = 16, **changes: Any) -> PreTrainedConfig:
    """Layers that slide and full ones in turn, attention sinks, experts with biases."""
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": window}
    return GptOssConfig(**_SHAPE | own | changes)


def qwen3_moe(**changes: Any) -> PreTrainedConfig:
    """Full attention with norms on queries and keys; eight experts in each layer, of which two are asked."""
    own = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    return Qwen3MoeConfig(**_SHAPE | own | changes)


def build_model(config: PreTrainedConfig, seed: int) -> Any:
    """A random model in float32 whose greedy tokens vary with the prompt."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                continue
            if parameter.dim() == 1 or "bias" in name or "sinks" in name:
                parameter.normal_(0, 0.5, generator=generator)
                continue
            # Experts multiply from the other side.
            fan_in = parameter.shape[-2] if parameter.dim() == 3 else parameter.shape[-1]
            parameter.normal_(0, fan_in**-0.5, generator=generator)
        embeddings = model.get_input_embeddings().weight
        if config.get_text_config().tie_word_embeddings:
            embeddings *= 0.3  # else a token, found again by its own embedding, would be the next one
            getattr(model.base_model, "language_model", model.base_model).norm.weight.fill_(2)
        else:
            embeddings.normal_(0, 1, generator=generator)
            model.lm_head.weight *= LOGIT_STD
    return model


def write_fusion(
    folder: Path,
    models: Mapping[str, PreTrainedConfig],
    *,
    seed: int = 0,
    gate: str = "random",
    engine: Mapping[str, Any] | None = None,
) -> Path:
    """Write models, tokenizers, gate and fusion file below `folder`; returns the path of fusion.yaml.

    `models` has the configurations of the specialists by name, the leader's first; `gate` is as in `tests/fakes.py`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, config) in enumerate(models.items()):
        build_tokenizer(VOCAB_SIZE, VOCAB_SIZE, name).save_pretrained(str(folder / name))
        build_model(config, seed=1000 * seed + index).save_pretrained(str(folder / name))
    settings = {"block_size": 32, "enforce_eager": True, "kv_cache_memory_bytes": 2**26, "dtype": "float32"}
    content = {
        "name": "tiny",
        "specialists": [
            {"name": name, "model": f"./{name}", "chat_template": template}
            for name, template in zip(models, TEMPLATES, strict=False)
        ],
        "eos_token_ids": [EOS_ID],
        "engine": settings | dict(engine or {}),
    }
    if len(models) > 1:
        sizes = [config.get_text_config().hidden_size for config in models.values()]
        save_gate(build_gate(gate, list(models), sizes, seed), folder / "gate.safetensors", list(models))
        content["gate"] = "gate.safetensors"
    path = folder / "fusion.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
