"""What is not fused is refused by name, before it can break lockstep without a sound."""

import math
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.worker.gpu_worker import Worker

import ultrafuser.server.engine
from tests.draft_heads import write_random_head
from tests.fakes import write_tiny_fusion
from tests.server.engine.harness import InProcessEngine, engine_input, random_prompts
from ultrafuser.gating.errors import FusionError, UserError
from ultrafuser.gating.model.fusion import inspect_fusion, load_fusion
from ultrafuser.gating.model.schema import SpeculationSettings
from ultrafuser.server.engine.core.scheduler import make_scheduler
from ultrafuser.server.engine.shared.node import Node, check_node
from ultrafuser.server.engine.shared.options import (
    ALLOWED_ENGINE_OPTIONS,
    GPU_WORKER,
    OWN_OPTIONS,
    SCHEDULER,
    EngineOptionError,
    check_devices,
    check_engine_options,
    engine_arguments,
    override_engine,
)
from ultrafuser.server.engine.shared.spec import ADDITIONAL_CONFIG_KEY, EngineSpec
from ultrafuser.server.engine_options import REFUSED_OPTIONS

PROMPTS = random_prompts((5, 6, 7), seed=0)


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "0.32.1+cpu"])
def test_another_vllm_release_is_refused_by_name(version: str) -> None:
    with pytest.raises(RuntimeError, match=rf"vllm {version.replace('+', '.')} is installed.*install vllm==0.32.0"):
        ultrafuser.server.engine.check_vllm_version(version)


def test_a_local_build_of_the_supported_release_is_accepted() -> None:
    ultrafuser.server.engine.check_vllm_version("0.32.0+cpu")
    with pytest.raises(RuntimeError):
        ultrafuser.server.engine.check_vllm_version("0.31.0+cpu")


@pytest.mark.parametrize(
    "option",
    [
        "speculative_config",
        "pipeline_parallel_size",
        "data_parallel_size",
        "decode_context_parallel_size",
        "kv_transfer_config",
        "enable_sleep_mode",
        "enable_lora",
        "runner",
        "model",
        "enable_prompt_embeds",
        "quantization",
    ],
)
def test_an_engine_option_off_the_list_stops_the_start(option: str) -> None:
    with pytest.raises(EngineOptionError, match=f"^{option}: [a-zA-Z].+"):
        check_engine_options({option: 2})


def test_an_unknown_engine_option_stops_the_start() -> None:
    with pytest.raises(EngineOptionError, match=r"^max_len: vLLM has no such engine option"):
        check_engine_options({"max_len": 5})


def test_traces_without_the_statistics_they_are_made_of_stop_the_start() -> None:
    """vLLM would fail at the end of the first request, and with it every other request."""
    with pytest.raises(EngineOptionError, match=r"^otlp_traces_endpoint: .*omit disable_log_stats"):
        check_engine_options({"otlp_traces_endpoint": "http://127.0.0.1:4317", "disable_log_stats": True})


def test_every_allowed_option_exists_in_vllm() -> None:
    from dataclasses import fields

    theirs = {field.name for field in fields(AsyncEngineArgs)}
    assert theirs >= ALLOWED_ENGINE_OPTIONS - OWN_OPTIONS
    assert not theirs & OWN_OPTIONS


def test_no_option_is_both_allowed_and_refused() -> None:
    assert not ALLOWED_ENGINE_OPTIONS & REFUSED_OPTIONS.keys()


@pytest.mark.parametrize(("option", "value"), [("max_model_len", 2048), ("tensor_parallel_size", 3)])
def test_an_engine_option_that_does_not_fit_the_models_stops_the_start(
    tiny_fusion: Path, option: str, value: int
) -> None:
    fusion = load_fusion(tiny_fusion)
    with pytest.raises(FusionError, match=f"engine.{option}: {value}"):
        engine_arguments(fusion, inspect_fusion(fusion), {option: value})


def test_engine_options_override_the_fusion_file(tiny_fusion: Path) -> None:
    fusion = load_fusion(tiny_fusion)
    args = AsyncEngineArgs(**engine_arguments(fusion, inspect_fusion(fusion), {"block_size": 64, "seed": 9}))
    assert (args.block_size, args.seed, args.enforce_eager) == (64, 9, True)


@pytest.mark.parametrize(
    ("given", "bound"),
    [
        (None, 2),
        ({"backend": "auto"}, 2),
        ({"max_whitespace_cnt": None}, None),
        ({"max_whitespace_cnt": 7, "backend": "xgrammar"}, 7),
        ({"disable_any_whitespace": True}, 0),
        (StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True), 0),
    ],
)
def test_white_space_in_json_is_bounded_unless_somebody_says_otherwise(
    tiny_fusion: Path, given: Any, bound: int | None
) -> None:
    fusion = load_fusion(tiny_fusion)
    options = {} if given is None else {"structured_outputs_config": given}
    config = AsyncEngineArgs(**engine_arguments(fusion, inspect_fusion(fusion), options)).create_engine_config()
    assert EngineSpec.from_vllm_config(config).max_whitespace == bound
    assert config.structured_outputs_config.backend == "xgrammar"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"backend": "guidance"}, "backend"),
        ({"max_whitespace_cnt": -1}, "max_whitespace_cnt"),
        ({"max_whitespace_cnt": True}, "max_whitespace_cnt"),
    ],
)
def test_settings_of_structured_output_that_cannot_be_kept_stop_the_start(given: dict[str, Any], named: str) -> None:
    with pytest.raises(EngineOptionError, match=f"structured_outputs_config: .*{named}"):
        check_engine_options({"structured_outputs_config": given})


def test_scheduler_and_worker_are_found_by_their_names(tiny_fusion: Path) -> None:
    fusion = load_fusion(tiny_fusion)
    args = AsyncEngineArgs(**engine_arguments(fusion, inspect_fusion(fusion)))
    assert args.scheduler_cls == SCHEDULER
    assert resolve_obj_by_qualname(SCHEDULER) is make_scheduler
    for name in (args.worker_cls, GPU_WORKER):
        assert issubclass(resolve_obj_by_qualname(name), Worker)


@pytest.mark.parametrize(
    ("parameter", "params"),
    [
        ("prompt_logprobs", SamplingParams(prompt_logprobs=1)),
        ("prompt_logprob_token_ids", SamplingParams(prompt_logprob_token_ids=[[5]])),
        ("allowed_token_ids", SamplingParams(allowed_token_ids=[5, 320])),
        ("specialist_prompts", SamplingParams(extra_args={"specialist_prompts": PROMPTS})),
    ],
)
def test_a_request_that_is_not_fused_is_refused(
    engine: InProcessEngine, parameter: str, params: SamplingParams
) -> None:
    with pytest.raises(VLLMValidationError, match=parameter):
        engine.llm.add_request("x", engine_input(PROMPTS), params)
    assert not engine.llm.has_unfinished_requests()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (PROMPTS[:2], "2 specialist prompts for 3 specialists"),
        ([[1], [], [2]], "specialist code is empty"),
        ([[1], [2], [3, 330]], "specialist math"),
        ([[1], [2, -1], [3, 4]], "specialist code"),
    ],
)
def test_a_wrong_own_prompt_is_refused(engine: InProcessEngine, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        engine.llm.add_request("x", engine_input(prompts), SamplingParams())
    assert not engine.llm.has_unfinished_requests()


def test_the_longest_own_prompt_must_be_the_canonical_one(engine: InProcessEngine) -> None:
    wrong = {**tokens_input([1, 2]), "specialist_prompts": PROMPTS}
    with pytest.raises(VLLMValidationError, match="longest specialist prompt must be the canonical one"):
        engine.llm.add_request("x", wrong, SamplingParams())


@pytest.mark.parametrize(("is_cpu", "seconds"), [(True, 1.5), (False, 0)], ids=["cpu", "gpu"])
def test_steps_are_bounded_on_a_cpu_unless_something_else_is_asked_for(
    tiny_fusion: Path, is_cpu: bool, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: is_cpu)
    assert max_step_seconds(tiny_fusion) == seconds
    assert max_step_seconds(tiny_fusion, enable_chunked_prefill=False, max_step_seconds=0) == 0
    assert max_step_seconds(tiny_fusion, max_step_seconds=2.5) == 2.5


def test_the_fusion_file_bounds_steps_unless_the_flag_does(tmp_path: Path) -> None:
    fusion = write_tiny_fusion(tmp_path, engine={"max_step_seconds": 0.25})
    assert max_step_seconds(fusion) == 0.25
    assert max_step_seconds(fusion, max_step_seconds=0) == 0


def test_a_bound_without_pieces_stops_the_start(tmp_path: Path, tiny_fusion: Path) -> None:
    """A prompt that does not fit into the bound would never be read."""
    in_file = write_tiny_fusion(tmp_path, engine={"max_step_seconds": 0.25})
    for fusion, options in ((tiny_fusion, {"max_step_seconds": 2}), (in_file, {})):
        with pytest.raises(EngineOptionError, match=r"^max_step_seconds: .* leave enable_chunked_prefill on, or set 0"):
            max_step_seconds(fusion, enable_chunked_prefill=False, **options)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "soon"])
def test_a_bound_that_is_no_time_is_refused(tmp_path: Path, value: float | str) -> None:
    fusion = write_tiny_fusion(tmp_path, engine={"max_step_seconds": value})
    with pytest.raises(FusionError, match=r"engine\.max_step_seconds"):
        load_fusion(fusion)


def max_step_seconds(fusion_path: Path, **options: Any) -> Any:
    """The bound that the engine would be started with."""
    fusion = load_fusion(fusion_path)
    arguments = engine_arguments(fusion, inspect_fusion(fusion), options)
    assert "max_step_seconds" not in arguments
    return arguments["additional_config"][ADDITIONAL_CONFIG_KEY]["max_step_seconds"]


@pytest.mark.parametrize("given", [{"max_tokens": 0}, {"drafter": "ngram", "max_tokens": 0}])
def test_without_drafts_vllm_is_told_of_none(tiny_fusion: Path, given: dict[str, int] | None) -> None:
    fusion = load_fusion(tiny_fusion)
    arguments = engine_arguments(fusion, inspect_fusion(fusion), {"speculation": given})
    assert arguments["speculative_config"] is None
    assert arguments["additional_config"][ADDITIONAL_CONFIG_KEY]["speculation"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 17}, r"speculation.max_tokens: .*16, got 17"),
        ({"max_tokens": 2, "min_tokens": 3}, r"engine.speculation.min_tokens: 3 is more than max_tokens, 2; lower it"),
        ({"drafter": "oracle", "max_tokens": 2}, r"speculation.drafter: .*'oracle'"),
        ({"tokens": 2}, r"speculation.tokens: "),
    ],
)
def test_speculation_that_cannot_be_is_refused(tiny_fusion: Path, given: dict[str, Any], message: str) -> None:
    fusion = load_fusion(tiny_fusion)
    with pytest.raises(UserError, match=message):
        engine_arguments(fusion, inspect_fusion(fusion), {"speculation": given})


def test_a_head_that_is_named_beside_the_file_is_looked_for_where_the_command_is_given(
    tiny_fusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_head(tiny_fusion, tmp_path / "heads" / "one")
    monkeypatch.chdir(tmp_path)
    fusion = load_fusion(tiny_fusion)
    given = {"drafter": "head", "path": "heads/one", "max_tokens": 2}
    arguments = engine_arguments(fusion, inspect_fusion(fusion), {"speculation": given})
    told = arguments["additional_config"][ADDITIONAL_CONFIG_KEY]["speculation"]
    assert told["path"] == str(tmp_path / "heads" / "one")
    (tmp_path / "heads" / "one" / "model.safetensors").unlink()
    with pytest.raises(FusionError, match=r"^engine\.speculation\.path: .*heads/one: has no model\.safetensors"):
        engine_arguments(fusion, inspect_fusion(fusion), {"speculation": given})


def num_drafts(fusion_path: Path, **options: Any) -> int:
    """How many tokens the engine would be started to guess ahead."""
    fusion = load_fusion(fusion_path)
    config = engine_arguments(fusion, inspect_fusion(fusion), options)["speculative_config"]
    return 0 if config is None else config["num_speculative_tokens"]


def test_tokens_are_guessed_ahead_by_default_on_a_cpu_alone(tiny_fusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_drafts(tiny_fusion) == num_drafts(tiny_fusion, speculation={}) == 4
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    assert num_drafts(tiny_fusion) == 0
    assert num_drafts(tiny_fusion, speculation={}) == 4


@pytest.mark.parametrize("given", [{"max_tokens": 2}, {}])
def test_speculation_beside_async_scheduling_is_refused_before_weights_are_prepared(given: dict[str, int]) -> None:
    with pytest.raises(EngineOptionError, match=r"^async_scheduling: does not go with speculation"):
        check_engine_options({"async_scheduling": True, "speculation": given})


@pytest.mark.parametrize("given", [{}, {"speculation": None}, {"speculation": {"max_tokens": 0}}])
def test_asynchronous_scheduling_ends_what_is_only_a_default(tiny_fusion: Path, given: dict[str, Any]) -> None:
    assert num_drafts(tiny_fusion, async_scheduling=True, **given) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exchange": "hidden"}, r"^exchange: .*set placement: split$"),
        ({"exchange": "logits", "placement": "shared"}, r"^exchange: .*set placement: split$"),
        (
            {"placement": "split", "distributed_executor_backend": "uni"},
            "^distributed_executor_backend: .*leave it out, or say mp, or ray$",
        ),
        (
            {"placement": "split", "async_scheduling": True, "speculation": {}},
            "^async_scheduling: does not go with speculation",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_placement_stops_the_start(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineOptionError, match=message):
        check_engine_options(options)


@pytest.mark.parametrize(("options", "exchange"), [({}, "logits"), ({"exchange": "hidden"}, "hidden")])
def test_split_placement_has_an_executor_of_its_own_and_drafts_if_they_are_asked_for(
    tiny_fusion: Path, options: dict[str, Any], exchange: str
) -> None:
    fusion = load_fusion(tiny_fusion)
    options = {"placement": "split", "speculation": {"max_tokens": 0}, **options}
    for own in (options, {name: value for name, value in options.items() if name != "speculation"}):
        arguments = engine_arguments(fusion, inspect_fusion(fusion), own)
        assert issubclass(resolve_obj_by_qualname(arguments["distributed_executor_backend"]), MultiprocExecutor)
        spec = EngineSpec.model_validate(arguments["additional_config"][ADDITIONAL_CONFIG_KEY])
        assert (spec.exchange, spec.speculation, arguments["speculative_config"]) == (exchange, None, None)
    asked = engine_arguments(fusion, inspect_fusion(fusion), options | {"speculation": {"drafter": "leading"}})
    spec = EngineSpec.model_validate(asked["additional_config"][ADDITIONAL_CONFIG_KEY])
    assert (spec.exchange, spec.speculation) == (exchange, SpeculationSettings(drafter="leading"))
    assert asked["speculative_config"]["num_speculative_tokens"] == 4


def test_one_specialist_has_nothing_to_split(tiny_fusion: Path) -> None:
    fusion = load_fusion(tiny_fusion)
    fusion = fusion.alone(fusion.specialists[1])
    arguments = engine_arguments(fusion, inspect_fusion(fusion), {"placement": "split"})
    assert "distributed_executor_backend" not in arguments


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"tensor_parallel_size": 2}, "EndingExecutor"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, "EndingExecutor"),
        ({"tensor_parallel_size": 2, "placement": "split"}, "SplitExecutor"),
        ({"tensor_parallel_size": 1}, None),
    ],
)
def test_several_ranks_end_together(tiny_fusion: Path, options: dict[str, Any], name: str | None) -> None:
    fusion = load_fusion(tiny_fusion)
    found = engine_arguments(fusion, inspect_fusion(fusion), options).get("distributed_executor_backend")
    assert (found and found.rpartition(".")[2]) == name


def test_more_shards_than_devices_are_refused_by_number(tiny_fusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    monkeypatch.setattr(type(current_platform), "device_count", lambda _: 1, raising=False)
    check_devices(load_fusion(tiny_fusion))
    with pytest.raises(
        EngineOptionError, match=r"^tensor_parallel_size: needs 2 devices, and there are 1; leave it out$"
    ):
        check_devices(override_engine(load_fusion(tiny_fusion), {"tensor_parallel_size": 2}))


def test_more_ranks_than_devices_are_refused_by_number(tiny_fusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fusion = override_engine(load_fusion(tiny_fusion), {"placement": "split", "tensor_parallel_size": 2})
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    monkeypatch.setattr(type(current_platform), "device_count", lambda _: 5, raising=False)
    with pytest.raises(EngineOptionError, match=r"^placement: split needs 6 devices.* there are 5; leave it out$"):
        check_devices(fusion)


def test_several_machines_need_a_device_for_their_own_ranks_only(
    tiny_fusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fusion = override_engine(load_fusion(tiny_fusion), {"placement": "split"})
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    monkeypatch.setattr(type(current_platform), "device_count", lambda _: 1, raising=False)
    check_node(fusion, Node(1, 3, "10.0.0.1", 29501))
    arguments = engine_arguments(fusion, inspect_fusion(fusion), {})
    assert arguments["distributed_executor_backend"].endswith("SplitExecutor")
