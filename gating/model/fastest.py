"""Which type `engine.dtype: fastest` is on a CPU, by the processor's flags and the memory. Knows no models."""

from collections.abc import Callable

import torch


def fastest_on_a_cpu(float32_bytes: Callable[[], int], memory_bytes: float) -> tuple[str, str]:
    """The type, and why.

    Args:
        float32_bytes: says how much weights and cache are in float32; asked only where it matters.
        memory_bytes: what the engine may take.
    """
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bfloat16", "this CPU has AVX-512, or instructions for it"
    needed = float32_bytes()
    sizes = f"{needed / 2**30:.1f} GiB of weights and cache in float32, {memory_bytes / 2**30:.1f} GiB of memory"
    if needed > memory_bytes:
        return "bfloat16", f"this CPU emulates it, but float32 does not fit ({sizes})"
    return "float32", f"this CPU would emulate bfloat16 ({sizes})"
