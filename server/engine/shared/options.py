"""From a fusion file to vLLM's engine arguments, through an allow-list of tested options.

The only place that decides which of vLLM's engine options a fused model may be started with. Whatever is not
on the list stops the start by name: an untested option could break lockstep without a sound.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from ultrafuser.gating.errors import UserError
from ultrafuser.gating.model.fusion import (
    EngineSettings,
    FusedModelInfo,
    FusionConfig,
    inspect_fusion,
    resolve_draft_head,
)
from ultrafuser.gating.model.schema import SpeculationSettings
from ultrafuser.server.engine.shared.dtype import dtypes_of
from ultrafuser.server.engine.shared.quantization import check_kernels
from ultrafuser.server.engine.shared.spec import EngineSpec, SpecialistSpec
from ultrafuser.server.engine_options import REFUSED_OPTIONS, EngineOptions
from ultrafuser.server.grammar.compiling import BOUNDED_WHITESPACE

_ENGINE = __name__.removesuffix(".shared.options")
SCHEDULER = f"{_ENGINE}.core.scheduler.make_scheduler"
CPU_WORKER = f"{_ENGINE}.worker.cpu_worker.FusedCPUWorker"
GPU_WORKER = f"{_ENGINE}.worker.worker.FusedGPUWorker"
NO_DRAFTS = f"{_ENGINE}.worker.drafting.NoDrafts"
ENDING_EXECUTOR = f"{_ENGINE}.core.ending_executor.EndingExecutor"
SPLIT_EXECUTOR = f"{_ENGINE}.core.split_executor.SplitExecutor"
RAY_EXECUTOR = f"{_ENGINE}.core.ray_executor.RayExecutor"
"""Names, for vLLM to import in the process they are for: what is imported here is imported in the API process, too."""

ALLOWED_ENGINE_OPTIONS = frozenset(EngineOptions.model_fields) | {"shutdown_timeout"}
"""What a fused model may be started with. The last one is no flag: the server has its own, as it waits for requests
before it ends the engine."""

OWN_OPTIONS = frozenset({"exchange", "max_step_seconds", "placement", "speculation"})
"""Options that vLLM has not; the engine's spec carries them."""

DEFAULT_MAX_STEP_SECONDS = 1.5
"""On a CPU, where a long prompt in one piece would hold all others up for minutes."""

OPTIONS_OF_MODELS = frozenset({"max_model_len", "speculation", "tensor_parallel_size"})
"""Options that must fit every specialist: the fusion is inspected again with them."""


BACKEND = "xgrammar"
"""The one library that keeps constraints."""

MAX_WHITESPACE = "max_whitespace_cnt"
"""Our setting among vLLM's of structured output, under the library's name."""


class EngineOptionError(UserError):
    """An engine option is unknown or not supported; the one-line message names it and the way out."""


def engine_arguments(
    fusion: FusionConfig, info: FusedModelInfo, engine_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Engine arguments of a fused model whose specialists are plain model folders (materialized).

    Their names, and those of `engine_options`, which override the fusion file's `engine` section, are those of vLLM's
    `EngineArgs`, and ours.

    Raises:
        EngineOptionError: an option is not on the allow-list.
        FusionError: an option does not fit the models, or this machine cannot compute one of them.
    """
    options = dict(engine_options or {})
    fusion = override_engine(fusion, options)
    settings = fusion.engine.model_dump(exclude_none=True) | options
    check_engine_options(settings)
    if options.keys() & OPTIONS_OF_MODELS:
        inspect_fusion(fusion)
    check_kernels(fusion)
    structured_outputs = settings.pop("structured_outputs_config", None)
    spec = engine_spec(fusion, info, max_whitespace_of(structured_outputs), bool(settings.get("async_scheduling")))
    settings = {name: value for name, value in settings.items() if name not in OWN_OPTIONS}
    if (executor := _executor(fusion, spec)) is not None:
        settings["distributed_executor_backend"] = executor
    return {
        "max_model_len": info.max_model_len,
        **settings,
        **spec.specialists[0].engine_arguments(),
        "served_model_name": [fusion.name],
        "structured_outputs_config": _of_one_backend(structured_outputs),
        "speculative_config": speculative_config(spec.speculation),
        "worker_cls": CPU_WORKER if current_platform.is_cpu() else GPU_WORKER,
        "scheduler_cls": SCHEDULER,
        "additional_config": spec.to_additional_config(),
        "generation_config": "vllm",
        "use_tqdm_on_load": False,
        "override_generation_config": _sampling_defaults(fusion),
    }


def _executor(fusion: FusionConfig, spec: EngineSpec) -> str | None:
    """The class that starts several ranks; None: vLLM's choice."""
    backend = fusion.engine.distributed_executor_backend
    if backend == "ray":
        return RAY_EXECUTOR
    if spec.exchange is not None:
        return SPLIT_EXECUTOR
    is_one = (fusion.engine.tensor_parallel_size or 1) == 1
    return ENDING_EXECUTOR if backend in (None, "mp") and not is_one else None


def speculative_config(speculation: SpeculationSettings | None) -> dict[str, Any] | None:
    """vLLM's configuration of room for drafts, which the fused step makes itself; None without drafts."""
    if speculation is None:
        return None
    return {"method": "custom_class", "model": NO_DRAFTS, "num_speculative_tokens": speculation.max_tokens}


def override_engine(fusion: FusionConfig, engine_options: Mapping[str, Any]) -> FusionConfig:
    """The fusion with the options in place of its file's engine settings, so that they are checked like these.

    Raises:
        EngineOptionError: a value that the fusion file could not have either.
    """
    known = {name: value for name, value in engine_options.items() if name in EngineSettings.model_fields}
    try:
        engine = EngineSettings.model_validate(fusion.engine.model_dump() | known)
    except ValidationError as error:
        first = error.errors()[0]
        raise EngineOptionError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}"
        ) from error
    return fusion.model_copy(update={"engine": resolve_draft_head(engine, Path.cwd())})


def check_engine_options(options: Mapping[str, Any]) -> None:
    """Refuse what is not on the allow-list, and what would only fail when requests come.

    Raises:
        EngineOptionError: naming the option, and the way out.
    """
    max_whitespace_of(options.get("structured_outputs_config"))
    if options.get("otlp_traces_endpoint") and options.get("disable_log_stats"):
        raise EngineOptionError("otlp_traces_endpoint: traces are made of vLLM's statistics; omit disable_log_stats")
    if options.get("max_step_seconds") and options.get("enable_chunked_prefill") is False:
        raise EngineOptionError(
            "max_step_seconds: needs prompts that are read in pieces; leave enable_chunked_prefill on, or set 0"
        )
    speculation = options.get("speculation")
    is_drafting = speculation is not None and SpeculationSettings.model_validate(speculation).max_tokens > 0
    if options.get("async_scheduling") and is_drafting:
        raise EngineOptionError("async_scheduling: does not go with speculation; leave one of them out")
    _check_placement(options)
    for name in options:
        if name not in ALLOWED_ENGINE_OPTIONS:
            raise EngineOptionError(f"{name}: {refusal(name)}")


def _check_placement(options: Mapping[str, Any]) -> None:
    if options.get("placement") != "split":
        if options.get("exchange") is not None:
            raise EngineOptionError("exchange: specialists that share devices exchange nothing; set placement: split")
        return
    if options.get("distributed_executor_backend") not in (None, "mp", "ray"):
        raise EngineOptionError(
            "distributed_executor_backend: specialists with placement: split run in processes of their own; leave it "
            "out, or say mp, or ray"
        )


def check_devices(fusion: FusionConfig) -> None:
    """Whether one machine has a device for every rank.

    Raises:
        EngineOptionError: it has fewer, or the ranks are meant for several machines.
    """
    engine = fusion.engine
    if engine.distributed_executor_backend == "ray":
        raise EngineOptionError(
            "distributed_executor_backend: ray needs `ultrafuser serve`, which prepares a cluster's nodes; leave it out"
        )
    if current_platform.is_cpu():
        return
    is_split, size = engine.placement == "split", engine.tensor_parallel_size or 1
    num_needed = size * (len(fusion.specialists) if is_split else 1)
    if num_needed > 1 and (num_devices := current_platform.device_count()) < num_needed:
        what, way_out = (
            ("placement: split needs", "tensor_parallel_size for each specialist, and")
            if is_split
            else ("tensor_parallel_size: needs", "and")
        )
        raise EngineOptionError(f"{what} {num_needed} devices, {way_out} there are {num_devices}; leave it out")


def refusal(name: str) -> str:
    """Why a fused model may not be started with an option that is not on the allow-list, and the way out."""
    if name in REFUSED_OPTIONS:
        return REFUSED_OPTIONS[name]
    if name in {field.name for field in fields(AsyncEngineArgs)}:
        return "not tested with fused models; leave it out"
    return "vLLM has no such engine option; see `ultrafuser serve --help`"


def max_whitespace_of(structured_outputs: Any) -> int | None:
    """How much white space settings of structured output allow between tokens of JSON; None: any number.

    Raises:
        EngineOptionError: a setting cannot be kept.
    """
    own = _as_mapping(structured_outputs)
    if own.get("backend", "auto") not in ("auto", BACKEND):
        raise EngineOptionError(f"structured_outputs_config: constraints are kept by {BACKEND} only; omit backend")
    if own.get("disable_any_whitespace"):
        return 0
    bound = own.get(MAX_WHITESPACE, BOUNDED_WHITESPACE)
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 0):
        raise EngineOptionError(f"structured_outputs_config: {MAX_WHITESPACE} must be a number from 0, or null")
    return bound


def _of_one_backend(structured_outputs: Any) -> dict[str, Any]:
    """vLLM's settings, without ours."""
    own = {name: value for name, value in _as_mapping(structured_outputs).items() if name != MAX_WHITESPACE}
    return own | {"backend": BACKEND}


def _as_mapping(structured_outputs: Any) -> Mapping[str, Any]:
    """Settings as they are given: as JSON, as vLLM's object, or not at all."""
    if structured_outputs is None:
        return {}
    return structured_outputs if isinstance(structured_outputs, Mapping) else asdict(structured_outputs)


def engine_spec(fusion: FusionConfig, info: FusedModelInfo, max_whitespace: int | None, is_async: bool) -> EngineSpec:
    """What workers and scheduler are told of the fused model; `is_async`: asynchronous scheduling was asked for."""
    return EngineSpec(
        specialists=tuple(
            SpecialistSpec(
                **item.model_dump(include={"name", "model", "revision", "quantization"}),
                dtype=dtype,
            )
            for item, dtype in zip(fusion.specialists, dtypes_of(fusion), strict=True)
        ),
        gate=None if fusion.gate is None else str(fusion.gate),
        hidden_sizes=info.hidden_sizes,
        vocab_sizes=info.vocab_sizes,
        num_shared_ids=info.num_shared_ids,
        eos_token_ids=fusion.eos_token_ids,
        max_whitespace=max_whitespace,
        max_step_seconds=_max_step_seconds(fusion.engine),
        exchange=_exchange(fusion),
        speculation=_speculation(fusion.engine, is_async),
    )


def _exchange(fusion: FusionConfig) -> Literal["logits", "hidden"] | None:
    """What specialists send where each has devices of its own; one alone has nobody to send anything to."""
    if fusion.engine.placement != "split" or len(fusion.specialists) == 1:
        return None
    return fusion.engine.exchange or "logits"


def _speculation(engine: EngineSettings, is_async: bool) -> SpeculationSettings | None:
    """How tokens are guessed ahead: as asked for, by default on a CPU whose specialists share it; None: not at all.

    With devices of its own a specialist's draft costs as long as the token that it saves.
    """
    asked = engine.speculation
    if asked is None and current_platform.is_cpu() and not is_async and engine.placement != "split":
        asked = SpeculationSettings()
    return asked if asked is not None and asked.max_tokens else None


def _max_step_seconds(engine: EngineSettings) -> float:
    """The bound that was asked for, or the device's default."""
    if engine.max_step_seconds is None:
        return DEFAULT_MAX_STEP_SECONDS if current_platform.is_cpu() else 0
    return engine.max_step_seconds


def _sampling_defaults(fusion: FusionConfig) -> dict[str, Any]:
    """The fusion file's sampling defaults under the names of a generation config."""
    defaults = fusion.sampling_defaults.model_dump(exclude_none=True)
    if "max_tokens" in defaults:
        defaults["max_new_tokens"] = defaults.pop("max_tokens")
    return defaults
