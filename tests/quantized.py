"""Quantises a model's folder in place, in the formats that people publish; every linear layer but the output layer.

Shape suffixes: N outputs, K inputs of a layer, G groups of inputs, P numbers packed into one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
"""Inputs that share a scale in the formats of 4 bits."""
_PER_INT32 = 8
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Tensors = dict[str, Tensor]


def int8(folder: Path) -> None:
    """compressed-tensors, W8A8: a scale for each output; activations are quantised token by token as they come."""
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight | {"strategy": "channel", "dynamic": False},
        "input_activations": eight | {"strategy": "token", "dynamic": True},
    }
    config = {"format": "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]}
    _rewrite(folder, _int8, config | {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}})


def awq(folder: Path) -> None:
    """AWQ's layout: 4 bits with zero points, outputs packed in its order of eights."""
    config = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    _rewrite(folder, _awq, config | {"quant_method": "awq"})


def gptq(folder: Path) -> None:
    """GPTQ's layout: 4 bits about a fixed zero, inputs packed in their order."""
    config = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
    _rewrite(folder, _gptq, config | {"quant_method": "gptq"})


def _rewrite(folder: Path, quantize: Callable[[Tensor], Tensors], config: dict[str, Any]) -> None:
    tensors: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            own = quantize(tensor.float())
            tensors |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in own.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def _int8(weight_NK: Tensor) -> Tensors:
    scale_N1 = weight_NK.abs().amax(dim=1, keepdim=True).clamp(min=1e-5) / 127
    return {"weight": (weight_NK / scale_N1).round().to(torch.int8), "weight_scale": scale_N1}


def _awq(weight_NK: Tensor) -> Tensors:
    groups_GKN = weight_NK.T.unflatten(0, (-1, GROUP))
    low_G1N, high_G1N = groups_GKN.amin(dim=1, keepdim=True), groups_GKN.amax(dim=1, keepdim=True)
    scale_G1N = ((high_G1N - low_G1N).clamp(min=1e-5) / 15).half().float()
    zero_G1N = (-low_G1N / scale_G1N).round().clamp(0, 15)
    levels_KN = (groups_GKN / scale_G1N + zero_G1N).round().clamp(0, 15).flatten(0, 1)
    return {
        "qweight": _pack(levels_KN, 1, _AWQ_ORDER),
        "qzeros": _pack(zero_G1N[:, 0], 1, _AWQ_ORDER),
        "scales": scale_G1N[:, 0].half(),
    }


def _gptq(weight_NK: Tensor) -> Tensors:
    groups_GKN = weight_NK.T.unflatten(0, (-1, GROUP))
    scale_G1N = (groups_GKN.abs().amax(dim=1, keepdim=True).clamp(min=1e-5) / 7).half().float()
    levels_KN = (groups_GKN / scale_G1N + 8).round().clamp(0, 15).flatten(0, 1)
    in_order = tuple(range(_PER_INT32))
    return {
        "qweight": _pack(levels_KN, 0, in_order),
        "qzeros": _pack(torch.full_like(scale_G1N[:, 0], 7), 1, in_order),  # the format holds a zero less one
        "scales": scale_G1N[:, 0].half(),
        "g_idx": torch.arange(weight_NK.shape[1], dtype=torch.int32) // GROUP,
    }


def _pack(levels: Tensor, dim: int, order: tuple[int, ...]) -> Tensor:
    """Eight numbers of 4 bits in each of int32, those that follow each other along `dim`."""
    eights_P = levels.long().unflatten(dim, (-1, _PER_INT32)).movedim(dim + 1, -1)
    packed = sum(eights_P[..., own] << (4 * place) for place, own in enumerate(order))
    assert isinstance(packed, Tensor)
    return torch.where(packed < 2**31, packed, packed - 2**32).to(torch.int32)
