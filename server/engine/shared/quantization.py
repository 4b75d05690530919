"""Quantised weights: what they are computed in, and whether this machine has the kernels. Reads configurations only."""

from typing import Any

import torch
from transformers import AutoConfig
from vllm.platforms import CpuArchEnum, current_platform

from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.schema import FusionConfig, SpecialistConfig


def is_quantized(specialist: SpecialistConfig) -> bool:
    """Whether its weights are, on disk or by vLLM when it loads them."""
    return specialist.quantization is not None or _own_words(specialist) is not None


def computes_in_float32(specialist: SpecialistConfig) -> bool:
    """Whether vLLM does so for its weights; it refuses float32 for quantised ones, but for 8-bit integers."""
    return not is_quantized(specialist) or (_own_words(specialist) or {}).get("format") == "int-quantized"


def check_kernels(fusion: FusionConfig) -> None:
    """Look whether this machine can multiply the specialists' weights.

    Raises:
        FusionError: it cannot; vLLM would find out at the first forward pass.
    """
    is_x86 = current_platform.is_cpu() and current_platform.get_cpu_architecture() == CpuArchEnum.X86
    if not is_x86 or torch.cpu._is_avx512_supported():
        return
    for index, specialist in enumerate(fusion.specialists):
        if _has_four_bits(specialist):
            raise FusionError(
                f"specialists.{index}.model: its weights have 4 bits, which vLLM multiplies only on CPUs with AVX-512;"
                " use the unquantised model or one of 8-bit integers (compressed-tensors), or a GPU"
            )


def _has_four_bits(specialist: SpecialistConfig) -> bool:
    own = _own_words(specialist) or {}
    return own.get("quant_method") in ("awq", "gptq") or own.get("format") == "pack-quantized"


def _own_words(specialist: SpecialistConfig) -> dict[str, Any] | None:
    """What a model's configuration says of its quantised weights."""
    config = AutoConfig.from_pretrained(specialist.model, revision=specialist.revision)
    return getattr(config, "quantization_config", None)
