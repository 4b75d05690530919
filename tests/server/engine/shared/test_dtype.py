"""`engine.dtype: fastest` is what this processor computes in, if it fits; an explicit type wins."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
import yaml
from vllm.platforms import current_platform

from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.fusion import FusionConfig, inspect_fusion, load_fusion
from ultrafuser.server.engine.shared import dtype as dtype_module
from ultrafuser.server.engine.shared.dtype import dtypes_of
from ultrafuser.server.engine.shared.options import engine_arguments
from ultrafuser.server.engine.shared.spec import ADDITIONAL_CONFIG_KEY
from ultrafuser.server.serving.fingerprint import fingerprint


@pytest.fixture
def fusion(tiny_fusion: Path) -> FusionConfig:
    """The tiny fusion as the demo is written: the fastest type, and no specialist with a type of its own."""
    fusion = load_fusion(tiny_fusion)
    plain = tuple(specialist.model_copy(update={"dtype": None}) for specialist in fusion.specialists)
    engine = fusion.engine.model_copy(update={"dtype": "fastest"})
    return fusion.model_copy(update={"specialists": plain, "engine": engine})


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that computes bfloat16 by way of float32."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def test_the_flags_of_this_processor_decide(fusion: FusionConfig) -> None:
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = capabilities["avx512_bw"] if "avx512_bw" in capabilities else capabilities["bf16"]
    assert set(dtypes_of(fusion)) == {"bfloat16" if has_bfloat16 else "float32"}


@pytest.mark.usefixtures("emulated")
def test_float32_is_taken_where_bfloat16_is_emulated_and_the_log_says_why(
    fusion: FusionConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert set(dtypes_of(fusion)) == {"float32"}
    assert "dtype: float32, the fastest here: this CPU would emulate bfloat16" in caplog.text


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("engine", "memory", "expected"),
    [
        ({"kv_cache_memory_bytes": 2**26}, 2**20, "bfloat16"),
        ({"kv_cache_memory_bytes": 2**26}, 2**28, "float32"),
        ({"kv_cache_memory_bytes": 2**26, "gpu_memory_utilization": 0.1}, 2**28, "bfloat16"),
        ({"kv_cache_memory_bytes": None}, 2**20, "bfloat16"),
        ({"kv_cache_memory_bytes": None}, 2**26, "float32"),
    ],
)
def test_float32_is_not_taken_where_weights_and_cache_would_not_fit(
    fusion: FusionConfig,
    monkeypatch: pytest.MonkeyPatch,
    engine: dict[str, float | None],
    memory: int,
    expected: str,
) -> None:
    node = dataclasses.replace(dtype_module.get_memory_node_info(), total_memory=memory)
    monkeypatch.setattr(dtype_module, "get_memory_node_info", lambda: node)
    fusion = fusion.model_copy(update={"engine": fusion.engine.model_copy(update=engine)})
    assert set(dtypes_of(fusion)) == {expected}


@pytest.mark.usefixtures("emulated")
def test_a_gpu_takes_what_the_models_were_made_in(fusion: FusionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    assert set(dtypes_of(fusion)) == {"auto"}


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("option", "expected"), [(None, "float32"), ("bfloat16", "bfloat16"), ("fastest", "float32")])
def test_an_explicit_type_wins(fusion: FusionConfig, option: str | None, expected: str) -> None:
    options = {} if option is None else {"dtype": option}
    arguments = engine_arguments(fusion, inspect_fusion(fusion), options)
    of_followers = [item["dtype"] for item in arguments["additional_config"][ADDITIONAL_CONFIG_KEY]["specialists"]]
    assert [arguments["dtype"], *of_followers] == [expected] * 4


def test_a_specialist_has_a_definite_type(tiny_fusion: Path) -> None:
    content = yaml.safe_load(tiny_fusion.read_text())
    content["specialists"][0]["dtype"] = "fastest"
    path = tiny_fusion.with_name("own_type.yaml")
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(FusionError, match=r"specialists.0.dtype: .*'fastest'"):
        load_fusion(path)


def test_random_weights_are_part_of_the_fingerprint(fusion: FusionConfig) -> None:
    dummy = fusion.model_copy(update={"engine": fusion.engine.model_copy(update={"load_format": "dummy"})})
    assert fingerprint(dummy, ["float32"] * 3) != fingerprint(fusion, ["float32"] * 3)


def test_the_type_is_part_of_the_fingerprint(fusion: FusionConfig) -> None:
    marks = {fingerprint(fusion, [dtype] * 3) for dtype in ("bfloat16", "float32", "float32")}
    assert len(marks) == 2


@pytest.mark.usefixtures("emulated")
def test_quantised_weights_are_not_computed_in_float32(fusion: FusionConfig) -> None:
    """vLLM refuses that, once the weights are prepared."""
    first, *others = fusion.specialists
    quantized = first.model_copy(update={"quantization": "compressed-tensors"})
    fusion = fusion.model_copy(update={"specialists": (quantized, *others)})
    assert dtypes_of(fusion) == ["auto", "float32", "float32"]
    explicit = fusion.model_copy(update={"engine": fusion.engine.model_copy(update={"dtype": "float32"})})
    assert dtypes_of(explicit) == ["float32"] * 3
