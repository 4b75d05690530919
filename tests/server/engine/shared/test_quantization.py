"""What quantised weights are computed in, and which of them this machine's CPU cannot multiply."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack
from vllm.platforms import current_platform

from tests import quantized
from tests.fakes import write_tiny_fusion
from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.fusion import inspect_fusion, load_fusion
from ultrafuser.gating.model.schema import FusionConfig
from ultrafuser.server.engine.shared.options import engine_arguments
from ultrafuser.server.engine.shared.quantization import check_kernels, computes_in_float32


def fusion_of(folder: Path, quantize: Any) -> FusionConfig:
    """A tiny fusion whose second specialist is quantised."""
    path = write_tiny_fusion(folder, vocab_sizes=(320,) * 3)
    quantize(folder / "code")
    return load_fusion(path)


@pytest.mark.parametrize("quantize", [quantized.awq, quantized.gptq])
def test_weights_of_4_bits_are_refused_on_a_cpu_without_avx512(
    tmp_path: Path, quantize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM found no kernel when it had loaded everything, and named none of the models."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    fusion = fusion_of(tmp_path, quantize)
    with pytest.raises(
        FusionError, match=r"^specialists\.1\.model: its weights have 4 bits.*; use the unquantised model"
    ):
        engine_arguments(fusion, inspect_fusion(fusion))
    assert [computes_in_float32(own) for own in fusion.specialists] == [True, False, True]
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    check_kernels(fusion)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    check_kernels(fusion)


def test_8_bit_integers_run_on_any_cpu_in_float32_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    fusion = fusion_of(tmp_path, quantized.int8)
    check_kernels(fusion)
    assert [computes_in_float32(own) for own in fusion.specialists] == [True] * 3
    named = fusion.specialists[0].model_copy(update={"quantization": "fp8"})
    assert not computes_in_float32(named)


@pytest.mark.parametrize("quantize", [quantized.awq, quantized.gptq])
def test_the_tests_weights_are_packed_as_vllm_packs_them(quantize: Any) -> None:
    levels_KN = torch.randint(0, 16, (64, 96), generator=torch.Generator().manual_seed(0))
    if quantize is quantized.awq:
        ours, theirs = quantized._pack(levels_KN, 1, quantized._AWQ_ORDER), awq_pack(levels_KN, 4, 64, 96)
    else:
        ours, theirs = quantized._pack(levels_KN, 0, tuple(range(8))), gptq_pack(levels_KN, 4, 64, 96)
    assert torch.equal(ours, theirs)
