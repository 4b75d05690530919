"""How much memory a fusion needs for weights and for keys and values, held against what is here.

From configurations and the heads of files of weights; no weight is read. What programs and activations take comes on
top. Knows no engine.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ultrafuser.gating.model.packaged import find_gguf
from ultrafuser.gating.model.schema import FusionConfig, SpecialistConfig
from ultrafuser.server.doctor.finding import Finding
from ultrafuser.server.doctor.gguf_header import read_head
from ultrafuser.server.doctor.machine import Machine

VLLM_MEMORY_SHARE = 0.92
"""vLLM's own `gpu_memory_utilization`, where the fusion file says none."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_TYPE_OF_HALF_PRECISION = "bfloat16"
"""vLLM's choice for a model whose own type is float32."""


@dataclass(frozen=True)
class ModelShape:
    """What memory a model takes depends on."""

    num_parameters: int
    stored_bytes: int
    """Bytes of its files of weights."""

    is_quantized: bool
    dtype: str
    """Of its own configuration."""

    cached_values: int
    """Keys and values of one token: 2 x layers x heads of keys x their size."""

    max_positions: int


@dataclass(frozen=True)
class NeededMemory:
    """Bytes, of all devices together."""

    dtypes: tuple[str, ...]
    """Each specialist's, as it will be computed."""

    weight_bytes: int
    kv_bytes_per_token: int
    """Of all specialists."""

    kv_bytes: int
    """What the cache will have: what the fusion file wants, else what weights leave."""

    kv_tokens: int
    """How many tokens it holds, of all requests together."""

    num_devices: int
    """Devices that it is spread over; on a CPU they share one memory."""

    memory_bytes: int
    """What there is for weights and cache together."""

    on_gpu: bool


def shape_of(folder: Path) -> ModelShape:
    """The shape of a model folder."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    is_quantized = getattr(config, "quantization_config", None) is not None
    config = config.get_text_config()
    files = sorted(folder.glob("*.safetensors"))
    sizes = [path.stat().st_size for path in files or sorted(folder.glob("*.bin"))]
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    num_parameters = sum(map(_num_elements, files)) if files else sum(sizes) // _ITEM_BYTES.get(dtype, 2)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * head_size
    return ModelShape(num_parameters, sum(sizes), is_quantized, dtype, cached, config.max_position_embeddings)


def shape_of_package() -> ModelShape:
    """The shape of the packaged model, which is made bfloat16 when it is prepared.

    Raises:
        PackagedModelError: it is not installed.
        ValueError: its file is none.
    """
    settings, num_parameters = read_head(find_gguf())
    own = settings["general.architecture"]
    heads, width = settings[f"{own}.attention.head_count"], settings[f"{own}.embedding_length"]
    kv_heads = settings.get(f"{own}.attention.head_count_kv", heads)
    head_size = settings.get(f"{own}.attention.key_length", width // heads)
    cached = 2 * settings[f"{own}.block_count"] * kv_heads * head_size
    positions = settings[f"{own}.context_length"]
    return ModelShape(num_parameters, 2 * num_parameters, False, "bfloat16", cached, positions)


def needed_memory(
    fusion: FusionConfig, shapes: Sequence[ModelShape], machine: Machine, *, on_gpu: bool
) -> NeededMemory:
    """What the fusion's weights and cache take, with the settings of its file; `on_gpu`: the engine runs there."""
    engine = fusion.engine
    size, num_own = engine.tensor_parallel_size or 1, len(shapes) if engine.placement == "split" else 1
    num_devices = size * num_own
    share = engine.gpu_memory_utilization or VLLM_MEMORY_SHARE
    usable = min(gpu.memory for gpu in machine.gpus) if on_gpu else machine.memory.usable
    dtypes = _dtypes(fusion, shapes, share * usable, on_gpu)
    weights, cached = zip(*map(_bytes_of, shapes, dtypes), strict=True)
    wanted = engine.kv_cache_memory_bytes
    if on_gpu:
        memory = int(num_devices * share * usable)
    else:
        memory = machine.memory.available if wanted else int(share * usable)
    # Devices are alike, so with specialists on their own the largest decides what every device has left.
    of_device = max(weights) * num_own if num_own > 1 else sum(weights)
    kv_bytes = wanted * num_devices if wanted else max(0, memory - of_device)
    per_token = max(cached) * num_own if num_own > 1 else sum(cached)
    return NeededMemory(
        tuple(dtypes), sum(weights), sum(cached), kv_bytes, kv_bytes // per_token, num_devices, memory, on_gpu
    )


def memory_findings(
    fusion: FusionConfig, shown: str, needed: NeededMemory, max_model_len: int, machine: Machine
) -> list[Finding]:
    """Why it does not fit; `shown` is the fusion as it was named, `max_model_len` the longest request in tokens."""
    engine, findings = fusion.engine, []
    serve = f"ultrafuser serve {shown}"
    if needed.on_gpu and needed.num_devices > len(machine.gpus):
        findings.append(
            Finding(
                f"engine: needs {needed.num_devices} GPUs, there are {len(machine.gpus)}",
                "set tensor_parallel_size and placement for those that are here",
            )
        )
    request = max_model_len * needed.kv_bytes_per_token
    if needed.weight_bytes + min(request, needed.kv_bytes or request) > needed.memory_bytes:
        findings.append(
            Finding(
                f"memory: weights of {gib(needed.weight_bytes)} and a cache do not fit in {gib(needed.memory_bytes)}",
                "serve it on more or larger devices, or name smaller or quantised models",
            )
        )
    elif needed.kv_tokens < max_model_len:
        findings.append(
            Finding(
                f"memory: a cache of {gib(needed.kv_bytes)} holds {needed.kv_tokens:,} tokens, a request may have "
                f"{max_model_len:,}",
                f"{serve} --max-model-len {needed.kv_tokens}",
            )
        )
    elif needed.weight_bytes + needed.kv_bytes > needed.memory_bytes:
        room = (needed.memory_bytes - needed.weight_bytes) // needed.num_devices
        findings.append(
            Finding(
                f"memory: {gib(needed.weight_bytes)} of weights and {gib(needed.kv_bytes)} of cache are more than "
                f"the {gib(needed.memory_bytes)} that are there",
                f"{serve} --kv-cache-memory-bytes {room}",
            )
        )
    available = machine.memory.available
    if not (needed.on_gpu or engine.kv_cache_memory_bytes or needed.memory_bytes <= available):
        findings.append(
            Finding(
                f"memory: vLLM wants {gib(needed.memory_bytes)} of {gib(machine.memory.usable)} to be available, "
                f"{gib(available)} are",
                f"{serve} --gpu-memory-utilization {int(100 * available / machine.memory.usable) / 100:.2f}",
            )
        )
    return findings


def gib(size: float) -> str:
    """A size for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _dtypes(fusion: FusionConfig, shapes: Sequence[ModelShape], memory: float, on_gpu: bool) -> list[str]:
    wanted: str = fusion.engine.dtype or "auto"
    if wanted == "fastest":
        wanted = "auto" if on_gpu else _fastest(fusion, shapes, memory)
    return [_dtype(item, shape, wanted) for item, shape in zip(fusion.specialists, shapes, strict=True)]


def _fastest(fusion: FusionConfig, shapes: Sequence[ModelShape], memory: float) -> str:
    from ultrafuser.gating.model.fastest import fastest_on_a_cpu

    weights = sum(_ITEM_BYTES["float32"] * shape.num_parameters for shape in shapes)
    return fastest_on_a_cpu(lambda: weights + (fusion.engine.kv_cache_memory_bytes or weights), memory)[0]


def _dtype(specialist: SpecialistConfig, shape: ModelShape, wanted: str) -> str:
    own = specialist.dtype or wanted
    if own == "auto":
        return shape.dtype if shape.dtype in ("bfloat16", "float16") else _TYPE_OF_HALF_PRECISION
    return own


def _bytes_of(shape: ModelShape, dtype: str) -> tuple[int, int]:
    """Of its weights, and of one token's keys and values."""
    item = _ITEM_BYTES[dtype]
    return shape.stored_bytes if shape.is_quantized else item * shape.num_parameters, item * shape.cached_values


def _num_elements(path: Path) -> int:
    """Of all tensors of a safetensors file, by its head: 8 bytes that say how long a JSON object is."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        head = json.loads(file.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in head.items() if name != "__metadata__")
