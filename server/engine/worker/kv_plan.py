"""What the layers of the specialists keep of a request, planned as one: every layer keeps all of it.

A sliding layer attends to its window only, and is planned as if it attended to everything. vLLM would free its blocks
by the canonical length, with which a specialist whose own prompt is shorter would lose keys that it still needs; and
layers of different windows would have blocks of their own, where one block of a request is a block of every layer.
Knows runners and their layers, no requests.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
    replace_as,
)
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.utils import AttentionGroup

_AMPLE_BYTES = 1 << 62
"""Memory given to a runner's own KV plan, whose size is decided by the common plan already."""


def plan_in_full(runner: GPUModelRunner, name: str) -> None:
    """Have a runner tell of its sliding layers as of full ones, whoever asks, and yet let them slide.

    `name` is the specialist's.
    """
    own_specs: Callable[[], dict[str, KVCacheSpec]] = runner.get_kv_cache_spec
    build: Callable[..., None] = runner.initialize_metadata_builders

    def in_full() -> dict[str, KVCacheSpec]:
        specs, key = own_specs(), f"specialists.{name}.model"
        _check_windows(specs, runner.model_config, key)
        return {
            layer: _in_full(spec, runner.cache_config.block_size, f"{key}: layer {layer}")
            for layer, spec in specs.items()
        }

    def build_by_window(*args: Any) -> None:
        layers = runner.compilation_config.static_forward_context
        runner.attn_groups = [
            [part for group in groups for part in _split_by_window(group, layers)] for groups in runner.attn_groups
        ]
        build(*args)

    runner.get_kv_cache_spec = in_full
    runner.initialize_metadata_builders = build_by_window


def _check_windows(specs: Mapping[str, KVCacheSpec], model_config: ModelConfig, key: str) -> None:
    """Those layers slide that the model's configuration names.

    Raises:
        ValueError: vLLM's implementation of the model decides by something else.
    """
    layer_types = getattr(model_config.hf_text_config, "layer_types", None)
    if not layer_types or model_config.get_sliding_window() is None:
        return
    for layer, spec in specs.items():
        named = layer_types[extract_layer_index(layer)]
        if (named == "sliding_attention") != (type(spec) is SlidingWindowSpec):
            raise ValueError(
                f"{key}: vLLM plans a {type(spec).__name__} for layer {layer}, which is of type {named} in the model's"
                " configuration (layer_types); choose another model"
            )


def _split_by_window(group: AttentionGroup, layers: Mapping[str, Any]) -> list[AttentionGroup]:
    """A group of layers for each window, as how a backend shares a step's work out depends on it.

    On a CPU the parts of a long request that a layer does not see at all are then not computed. With attention sinks
    they must not be: vLLM 0.32.0 counts a sink wrongly if they are. FlashInfer refuses different windows in a group.
    """
    names: dict[int | None, list[str]] = {}
    for layer in group.layer_names:
        names.setdefault(getattr(layers[layer], "sliding_window", None), []).append(layer)
    return [AttentionGroup(group.backend, own, group.kv_cache_spec, group.kv_cache_group_id) for own in names.values()]


def _in_full(spec: KVCacheSpec, block_size: int, layer: str) -> KVCacheSpec:
    """The plan of a layer of full attention with the same heads.

    Raises:
        ValueError: the layer keeps something else than keys and values of single tokens.
    """
    if type(spec) is SlidingWindowSpec:
        drop = ("sliding_window", "extra_retained_tokens")
        return replace_as(spec, FullAttentionSpec, drop=drop, block_size=block_size, page_size_padded=None)
    if not isinstance(spec, FullAttentionSpec) or spec.attention_chunk_size is not None:
        raise ValueError(
            f"{layer} keeps a {type(spec).__name__} KV cache; only full and sliding attention can be fused, choose a "
            "model without chunked attention or state layers"
        )
    return spec


def own_kv_cache_config(runner: GPUModelRunner, common: KVCacheConfig) -> KVCacheConfig:
    """Plan one runner's layers again, with the block count that the common plan decided."""
    config: VllmConfig = copy.copy(runner.vllm_config)
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.num_gpu_blocks_override = common.num_blocks
    (own,) = get_kv_cache_configs(config, [runner.get_kv_cache_spec()], [_AMPLE_BYTES])
    own.kv_cache_layout = common.kv_cache_layout
    own.hash_block_size = common.hash_block_size
    own.cache_hit_alignment_tokens = common.cache_hit_alignment_tokens
    return own
