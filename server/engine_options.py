"""The engine's options: those that a fused model may be started with, and those that people will try.

The only list: command line, environment and the engine's allow-list are made of it. Names are those of vLLM's
`EngineArgs`, but for our own. Knows no vLLM, so that a command line can be laid out at once.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ultrafuser.gating.model.schema import Count, EngineSettings


class EngineOptions(EngineSettings):
    """Every option that was tested: those of the fusion file's `engine` section, and what only a server needs."""

    async_scheduling: bool | None = None
    """Schedule the next step while this one runs (GPU only); default: vLLM decides."""

    enable_chunked_prefill: bool | None = None
    """Compute long prompts in pieces, between the steps of running responses."""

    scheduling_policy: Literal["fcfs", "priority"] | None = None
    """Serve requests in order of arrival (fcfs) or of their `priority` field."""

    max_num_queued_reqs: Count | None = None
    """Refuse requests with 503 when this many are unfinished; default: twice max_num_seqs, at most 1024."""

    max_num_queued_tokens: Count | None = None
    """Refuse requests with 503 when this many prompt tokens wait; default: no limit."""

    max_logprobs: Annotated[int, Field(ge=-1)] | None = None
    """Most log probabilities per token a request may ask for; -1: the whole vocabulary; default: 20."""

    logprobs_mode: Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"] | None = None
    """What logprobs are: of the fused logits as they are (raw) or after penalties and masks (processed)."""

    structured_outputs_config: dict[str, Any] | None = None
    """Settings of structured output as JSON: '{"max_whitespace_cnt": null}' lets any white space stand between tokens
    of JSON, a number at most so many characters (2 by default), '{"disable_any_whitespace": true}' none."""

    prefix_caching_hash_algo: Literal["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"] | None = None
    """How blocks of the prefix cache are hashed."""

    otlp_traces_endpoint: str | None = None
    """Send vLLM's request traces to this OpenTelemetry collector."""

    disable_log_stats: bool | None = None
    """Do not collect vLLM's metrics; /metrics then lacks the vllm:* series."""

    enable_log_requests: bool | None = None
    """Log when the engine receives, finishes and aborts a request (its id, never its text)."""


REFUSED_OPTIONS: Mapping[str, str] = {
    "speculative_config": "it is one model's own; use --speculation",
    "pipeline_parallel_size": "pipeline parallelism is not fused; use tensor_parallel_size",
    "data_parallel_size": "data parallelism is not fused; start replicas behind a load balancer",
    "prefill_context_parallel_size": "context parallelism is not fused; use tensor_parallel_size",
    "decode_context_parallel_size": "context parallelism is not fused; use tensor_parallel_size",
    "enable_expert_parallel": "expert parallelism is not fused; use tensor_parallel_size, which shards each expert",
    "enable_eplb": "expert parallelism is not fused; use tensor_parallel_size, which shards each expert",
    "kv_transfer_config": "KV connectors carry one model's cache only; start without them",
    "enable_sleep_mode": "sleep and weight reload are not fused; restart the server instead",
    "enable_lora": "LoRA requests are not fused; name an adapter per specialist in the fusion file",
    "lora_modules": "LoRA requests are not fused; name an adapter per specialist in the fusion file",
    "runner": "pooling is not fused; a fused model generates text",
    "convert": "pooling is not fused; a fused model generates text",
    "model": "the fusion file names the models; edit specialists there",
    "quantization": "quantization is set per specialist in the fusion file",
    "revision": "revisions are set per specialist in the fusion file",
    "generation_config": "sampling defaults are set in the fusion file",
    "override_generation_config": "sampling defaults are set in the fusion file",
    "chat_template": "chat templates are set per specialist in the fusion file",
    "trust_request_chat_template": "a request cannot bring a template: each specialist has its own",
    "api_server_count": "several frontend processes are not supported; start replicas behind a load balancer",
    "headless": "a fused engine has one frontend; start replicas behind a load balancer",
    "uvicorn_log_level": "use --log-level",
    "allowed_origins": "use --allowed-origin, once per origin",
}
"""Options of vLLM's engine and flags of `vllm serve` that people will try, each with the way out."""
