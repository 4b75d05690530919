"""From a fusion file to vLLM's engine arguments, through an allow-list of tested options.

The only place that decides which of vLLM's engine options a fused model may be started with. Whatever is not
on the list stops the start by name: an untested option could break lockstep without a sound.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform

from gating.model.fusion import FusedModelInfo, FusionConfig, inspect_fusion
from server.engine.shared.spec import EngineSpec, SpecialistSpec

_ENGINE = __name__.removesuffix(".shared.options")
SCHEDULER = f"{_ENGINE}.core.scheduler.make_scheduler"
CPU_WORKER = f"{_ENGINE}.worker.cpu_worker.FusedCPUWorker"
GPU_WORKER = f"{_ENGINE}.worker.worker.FusedGPUWorker"
"""Names, for vLLM to import in the process they are for: what is imported here is imported in the API process, too."""

ALLOWED_ENGINE_OPTIONS: frozenset[str] = frozenset(
    {
        "async_scheduling",
        "block_size",
        "disable_log_stats",
        "distributed_executor_backend",
        "dtype",
        "enable_chunked_prefill",
        "enable_log_requests",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "logprobs_mode",
        "max_logprobs",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_queued_reqs",
        "max_num_queued_tokens",
        "max_num_seqs",
        "num_gpu_blocks_override",
        "otlp_traces_endpoint",
        "prefix_caching_hash_algo",
        "scheduling_policy",
        "seed",
        "shutdown_timeout",
        "structured_outputs_config",
        "tensor_parallel_size",
    }
)
"""vLLM engine options that a fused model may be started with, by their field names in vLLM's `EngineArgs`."""

REFUSED_ENGINE_OPTIONS: Mapping[str, str] = {
    "speculative_config": "speculative decoding is not fused yet; start without it",
    "pipeline_parallel_size": "pipeline parallelism is not fused; use tensor_parallel_size",
    "data_parallel_size": "data parallelism is not fused; start replicas behind a load balancer",
    "prefill_context_parallel_size": "context parallelism is not fused; use tensor_parallel_size",
    "decode_context_parallel_size": "context parallelism is not fused; use tensor_parallel_size",
    "kv_transfer_config": "KV connectors carry one model's cache only; start without them",
    "enable_sleep_mode": "sleep and weight reload are not fused; restart the server instead",
    "enable_lora": "LoRA requests are not fused; name an adapter per specialist in the fusion file",
    "runner": "pooling is not fused; a fused model generates text",
    "convert": "pooling is not fused; a fused model generates text",
    "model": "the fusion file names the models; edit specialists there",
    "quantization": "quantization is set per specialist in the fusion file",
    "revision": "revisions are set per specialist in the fusion file",
}
"""Options that people will try, each with the way out."""


OPTIONS_OF_MODELS = frozenset({"max_model_len", "tensor_parallel_size"})
"""Options that must fit every specialist: the fusion is inspected again with them."""


class EngineOptionError(ValueError):
    """An engine option is unknown or not supported; the one-line message names it and the way out."""


def build_engine_args(
    fusion: FusionConfig, info: FusedModelInfo, engine_options: Mapping[str, Any] | None = None
) -> AsyncEngineArgs:
    """Engine arguments of a fused model whose specialists are plain model folders (materialized).

    `engine_options` override the fusion file's `engine` section; names are those of vLLM's `EngineArgs`.

    Raises:
        EngineOptionError: an option is not on the allow-list.
        FusionError: an option does not fit the models.
    """
    return AsyncEngineArgs(**engine_arguments(fusion, info, engine_options))


def engine_arguments(
    fusion: FusionConfig, info: FusedModelInfo, engine_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """As `build_engine_args`, by name, for callers that make vLLM's `EngineArgs` themselves."""
    options = dict(engine_options or {})
    check_engine_options(options)
    if options.keys() & OPTIONS_OF_MODELS:
        changes = {name: value for name, value in options.items() if name in OPTIONS_OF_MODELS}
        inspect_fusion(fusion.model_copy(update={"engine": fusion.engine.model_copy(update=changes)}))
    settings = fusion.engine.model_dump(exclude_none=True) | options
    spec = engine_spec(fusion, info, settings.pop("dtype", "auto"))
    leader = spec.specialists[0]
    return {
        "max_model_len": info.max_model_len,
        **settings,
        "model": leader.model,
        "revision": leader.revision,
        "dtype": leader.dtype,
        "quantization": leader.quantization,
        "served_model_name": [fusion.name],
        "worker_cls": CPU_WORKER if current_platform.is_cpu() else GPU_WORKER,
        "scheduler_cls": SCHEDULER,
        "additional_config": spec.to_additional_config(),
        "generation_config": "vllm",
        "use_tqdm_on_load": False,
        "override_generation_config": _sampling_defaults(fusion),
    }


def check_engine_options(options: Mapping[str, Any]) -> None:
    """Refuse what is not on the allow-list, and what vLLM would only fail at when the first request ends.

    Raises:
        EngineOptionError: naming the option, and the way out.
    """
    if options.get("otlp_traces_endpoint") and options.get("disable_log_stats"):
        raise EngineOptionError("otlp_traces_endpoint: traces are made of vLLM's statistics; omit disable_log_stats")
    known = {field.name for field in fields(EngineArgs)} | {field.name for field in fields(AsyncEngineArgs)}
    for name in options:
        if name in ALLOWED_ENGINE_OPTIONS:
            continue
        if name not in known:
            raise EngineOptionError(f"{name}: vLLM has no such engine option; see `ultrafuser serve --help`")
        reason = REFUSED_ENGINE_OPTIONS.get(name, "not tested with fused models; leave it out")
        raise EngineOptionError(f"{name}: {reason}")


def engine_spec(fusion: FusionConfig, info: FusedModelInfo, default_dtype: str) -> EngineSpec:
    """What the workers are told of the fused model."""
    return EngineSpec(
        specialists=tuple(
            SpecialistSpec(
                name=specialist.name,
                model=str(specialist.model),
                revision=specialist.revision,
                dtype=specialist.dtype or default_dtype,
                quantization=specialist.quantization,
            )
            for specialist in fusion.specialists
        ),
        gate=None if fusion.gate is None else str(fusion.gate),
        hidden_sizes=info.hidden_sizes,
        vocab_sizes=info.vocab_sizes,
        num_shared_ids=info.num_shared_ids,
        eos_token_ids=fusion.eos_token_ids,
    )


def _sampling_defaults(fusion: FusionConfig) -> dict[str, Any]:
    """The fusion file's sampling defaults under the names of a generation config."""
    defaults = fusion.sampling_defaults.model_dump(exclude_none=True)
    if "max_tokens" in defaults:
        defaults["max_new_tokens"] = defaults.pop("max_tokens")
    return defaults
