"""The memory that a fusion needs, held against the models themselves, and what is said where it does not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM
from vllm.engine.arg_utils import EngineArgs

from ultrafuser.gating.model.fusion import FusionConfig
from ultrafuser.gating.model.packaged import find_gguf
from ultrafuser.server.doctor.finding import Finding
from ultrafuser.server.doctor.machine import GPU, Machine, Memory, look
from ultrafuser.server.doctor.needed_memory import (
    VLLM_MEMORY_SHARE,
    NeededMemory,
    memory_findings,
    needed_memory,
    shape_of,
    shape_of_package,
)

GIB = 2**30
CONTEXT = 1024
PER_TOKEN = 2 * (2 + 3 + 1) * 2 * 32 * 4
"""Keys and values of the tiny fusion: 2 x layers of all x heads x their size x float32."""


@pytest.fixture
def machine() -> Machine:
    """16 GiB, of which 15 are available, and no GPU."""
    return replace(look(()), memory=Memory(16 * GIB, 15 * GIB, None))


def with_engine(fusion: FusionConfig, **engine: Any) -> FusionConfig:
    return fusion.model_copy(update={"engine": fusion.engine.model_copy(update=engine)})


def needs(fusion: FusionConfig, machine: Machine, **engine: Any) -> tuple[NeededMemory, list[Finding]]:
    shapes = [shape_of(Path(item.model)) for item in fusion.specialists]
    fusion = with_engine(fusion, **engine)
    needed = needed_memory(fusion, shapes, machine, on_gpu=bool(machine.gpus))
    return needed, memory_findings(fusion, "my.yaml", needed, CONTEXT, machine)


def test_the_share_is_vllms_own() -> None:
    assert EngineArgs.gpu_memory_utilization == VLLM_MEMORY_SHARE


def test_parameters_are_counted_from_the_heads_of_files(fusion: FusionConfig) -> None:
    for specialist in fusion.specialists:
        model = AutoModelForCausalLM.from_pretrained(specialist.model)
        shape = shape_of(Path(specialist.model))
        assert shape.num_parameters == model.num_parameters()
        assert shape.max_positions == CONTEXT


def test_the_packaged_model_has_the_shape_that_the_files_library_reads() -> None:
    reader = GGUFReader(find_gguf())
    told = shape_of_package()
    assert told.num_parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    layers, heads, positions = (
        reader.fields[f"llama.{name}"].contents()
        for name in ("block_count", "attention.head_count_kv", "context_length")
    )
    head_size = reader.fields["llama.rope.dimension_count"].contents()
    assert (told.cached_values, told.max_positions) == (2 * layers * heads * head_size, positions)


def test_weights_and_cache_are_those_of_all_specialists(fusion: FusionConfig, machine: Machine) -> None:
    needed, findings = needs(fusion, machine)
    assert needed.weight_bytes == 4 * sum(shape_of(Path(item.model)).num_parameters for item in fusion.specialists)
    assert needed.kv_bytes_per_token == PER_TOKEN
    assert (needed.kv_bytes, needed.kv_tokens) == (2**26, 2**26 // PER_TOKEN)
    assert needed.memory_bytes == 15 * GIB
    assert findings == []


def test_a_narrower_type_takes_half(fusion: FusionConfig, machine: Machine) -> None:
    wide, _ = needs(fusion, machine)
    plain = tuple(item.model_copy(update={"dtype": None}) for item in fusion.specialists)
    narrow, _ = needs(fusion.model_copy(update={"specialists": plain}), machine, dtype="bfloat16")
    assert narrow.dtypes == ("bfloat16",) * 3
    assert 2 * narrow.weight_bytes == wide.weight_bytes
    assert 2 * narrow.kv_bytes_per_token == wide.kv_bytes_per_token


@pytest.mark.parametrize(("is_supported", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_the_fastest_type_is_the_engines(
    fusion: FusionConfig, machine: Machine, monkeypatch: pytest.MonkeyPatch, is_supported: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_supported)
    plain = tuple(item.model_copy(update={"dtype": None}) for item in fusion.specialists)
    needed, _ = needs(fusion.model_copy(update={"specialists": plain}), machine, dtype="fastest")
    assert needed.dtypes == (expected,) * 3


def test_without_a_wish_the_cache_has_what_weights_leave_of_the_share(fusion: FusionConfig, machine: Machine) -> None:
    needed, findings = needs(fusion, machine, kv_cache_memory_bytes=None, gpu_memory_utilization=0.5)
    assert needed.memory_bytes == 8 * GIB
    assert needed.kv_bytes == 8 * GIB - needed.weight_bytes
    assert findings == []


def test_a_share_that_is_not_available_is_told_with_one_that_is(fusion: FusionConfig, machine: Machine) -> None:
    busy = replace(machine, memory=Memory(16 * GIB, 4 * GIB, None))
    _, (finding,) = needs(fusion, busy, kv_cache_memory_bytes=None)
    assert finding.what == "memory: vLLM wants 14.7 GiB of 16.0 GiB to be available, 4.0 GiB are"
    assert finding.way_out == "ultrafuser serve my.yaml --gpu-memory-utilization 0.25"


def test_a_cache_that_holds_no_request_is_told_with_what_it_holds(fusion: FusionConfig, machine: Machine) -> None:
    _, (finding,) = needs(fusion, machine, kv_cache_memory_bytes=100 * PER_TOKEN)
    assert "holds 100 tokens, a request may have 1,024" in finding.what
    assert finding.way_out == "ultrafuser serve my.yaml --max-model-len 100"


def test_a_cache_that_does_not_fit_is_told_with_one_that_does(fusion: FusionConfig, machine: Machine) -> None:
    needed, (finding,) = needs(fusion, machine, kv_cache_memory_bytes=15 * GIB)
    assert finding.way_out == f"ultrafuser serve my.yaml --kv-cache-memory-bytes {15 * GIB - needed.weight_bytes}"


def test_weights_that_do_not_fit_are_told(fusion: FusionConfig, machine: Machine) -> None:
    small = replace(machine, memory=Memory(16 * GIB, 2**20, None))
    _, (finding,) = needs(fusion, small)
    assert "do not fit in 1.0 MiB" in finding.what


@pytest.mark.parametrize(
    ("engine", "num_gpus", "num_findings"),
    [
        ({}, 1, 0),
        ({"tensor_parallel_size": 2}, 1, 1),
        ({"tensor_parallel_size": 2}, 2, 0),
        ({"placement": "split"}, 2, 1),
        ({"placement": "split"}, 3, 0),
    ],
)
def test_gpus_are_counted(
    fusion: FusionConfig, machine: Machine, engine: dict[str, Any], num_gpus: int, num_findings: int
) -> None:
    gpus = (GPU("Made-up GPU", 8 * GIB, "9.0"),) * num_gpus
    needed, findings = needs(fusion, replace(machine, gpus=gpus), gpu_memory_utilization=0.5, **engine)
    assert needed.memory_bytes == needed.num_devices * 4 * GIB
    assert len(findings) == num_findings
    assert [finding for finding in findings if f"there are {num_gpus}" not in finding.what] == []


def test_specialists_on_their_own_leave_what_the_largest_leaves(fusion: FusionConfig, machine: Machine) -> None:
    gpus = (GPU("Made-up GPU", 8 * GIB, "9.0"),) * 3
    engine = {"placement": "split", "gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": None}
    needed, _ = needs(fusion, replace(machine, gpus=gpus), **engine)
    largest = 4 * max(shape_of(Path(item.model)).num_parameters for item in fusion.specialists)
    assert needed.kv_bytes == 3 * (4 * GIB - largest)
    assert needed.kv_tokens == (4 * GIB - largest) // (2 * 3 * 2 * 32 * 4)
