"""What a specialist's model finds around it while it is built, in a process that was set up for the leader's.

Sliding windows and the group of ranks that share experts are the leader's there, or missing. Knows runners, and nothing
of what they compute.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import CacheConfig, ModelConfig, set_current_vllm_config
from vllm.distributed import get_tp_group, parallel_state
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


@contextmanager
def scope_of(runner: GPUModelRunner) -> Iterator[None]:
    """Build a runner's model as if it were alone: with its own configuration, window and experts."""
    if runner.model_config.is_moe:
        _share_experts()
    with set_current_vllm_config(runner.vllm_config), _own_window(runner):
        yield


def _share_experts() -> None:
    """Give models with experts the group that they look for, which vLLM makes if the leader has experts.

    Every rank holds a shard of each expert, so it is the tensor-parallel group; nothing is sent over it.
    """
    if parallel_state._EP is None:
        parallel_state._EP = get_tp_group()


@contextmanager
def _own_window(runner: GPUModelRunner) -> Iterator[None]:
    """The window of a model whose layers all slide alike stands nowhere but in the cache's configuration, and the
    specialists share that: the leader's window would be everybody's."""
    shared: CacheConfig = runner.cache_config
    leaders, shared.sliding_window = shared.sliding_window, _window_of_all_layers(runner.model_config)
    try:
        yield
    finally:
        shared.sliding_window = leaders


def _window_of_all_layers(model_config: ModelConfig) -> int | None:
    """As vLLM's `EngineArgs.create_engine_config`; None: each layer names its own, or there is none."""
    layer_types = getattr(model_config.hf_text_config, "layer_types", None) or ()
    if any(layer_type != "sliding_attention" for layer_type in layer_types):
        return None
    window: int | None = model_config.get_sliding_window()
    return window
