"""Specialists as training needs them: prepared on disk, loaded frozen, and made to learn by adapters or wholly.

Knows Transformers models and peft adapters. Does not know gates' losses, data or trainers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ultrafuser.gating.model.cache import Report, fingerprint
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.model.schema import FRESH_GATE, FusionConfig, SpecialistConfig

ADAPTER_NAME = "default"


def prepare(
    fusion: FusionConfig, cache_dir: Path, *, keep_adapters: bool, on_progress: Report | None = None
) -> FusionConfig:
    """The fusion with plain model folders; adapters are merged, or kept beside their models to learn on.

    Raises:
        FusionError: as `materialize`.
    """
    if not keep_adapters:
        return materialize(fusion, cache_dir, on_progress)
    bare = [item.model_copy(update={"adapter": None}) for item in fusion.specialists]
    prepared = materialize(fusion.model_copy(update={"specialists": tuple(bare)}), cache_dir, on_progress)
    specialists = [
        item.model_copy(update={"adapter": own.adapter})
        for item, own in zip(prepared.specialists, fusion.specialists, strict=True)
    ]
    return prepared.model_copy(update={"specialists": tuple(specialists)})


def identify(specialist: SpecialistConfig) -> dict[str, Any]:
    """What a prepared specialist's weights depend on, as JSON values; large files by size and time."""
    folder = Path(specialist.model)
    model: object = fingerprint(folder) if folder.is_dir() else [specialist.model, specialist.revision]
    adapter = specialist.adapter and Path(specialist.adapter)
    return {"model": model, "adapter": fingerprint(adapter) if adapter and adapter.is_dir() else specialist.adapter}


def empty_model(specialist: SpecialistConfig) -> Any:
    """A specialist's model without memory, on the meta device: to count, not to compute."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(specialist.model, revision=specialist.revision)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_frozen(fusion: FusionConfig, dtype: torch.dtype) -> nn.ModuleList:
    """The specialists without their adapters, in eval mode, on the CPU; none of their parameters learns.

    Raises:
        FusionError: as `UltraFuserForCausalLM.from_fusion`.
    """
    bare = [item.model_copy(update={"adapter": None}) for item in fusion.specialists]
    gate = FRESH_GATE if len(bare) > 1 else None
    plain = fusion.without_draft_head().model_copy(update={"specialists": tuple(bare), "gate": gate})
    return UltraFuserForCausalLM.from_fusion(plain, dtype=dtype).specialists.requires_grad_(False)


def load_one_frozen(fusion: FusionConfig, index: int, dtype: torch.dtype) -> Any:
    """One specialist alone, as `load_frozen`."""
    return load_frozen(fusion.alone(fusion.specialists[index]), dtype)[0]


def add_adapter(model: Any, adapter: str | None, *, rank: int, alpha: int, dropout: float) -> None:
    """Let a frozen model learn by a low-rank adapter on all of its linear layers but the output layer.

    Args:
        model: a Transformers model; changed in place.
        adapter: a folder or hub id to go on from; null starts a new one, which changes nothing yet.
        rank, alpha, dropout: of a new adapter.
    """
    from peft import LoraConfig

    if adapter is not None:
        model.load_adapter(adapter, adapter_name=ADAPTER_NAME, is_trainable=True)
    else:
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model.add_adapter(config, adapter_name=ADAPTER_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_adapter(model: Any, state: Mapping[str, Tensor], folder: Path, base_model: str) -> None:
    """Write the adapter as peft does, in the type of the model it belongs to.

    Args:
        model: that learnt by `add_adapter`.
        state: its trained parameters by name, in float32.
        folder: is made.
        base_model: noted in the adapter's configuration.
    """
    model.peft_config[ADAPTER_NAME].base_model_name_or_path = base_model
    model.save_pretrained(folder, state_dict=dict(state))
    path = folder / "adapter_model.safetensors"
    dtype = stored_dtype(model)
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def save_model(model: Any, state: Mapping[str, Tensor], folder: Path, source: SpecialistConfig) -> None:
    """Write a wholly trained specialist as a plain model folder with its tokenizer, in its stored type."""
    from transformers import AutoTokenizer

    dtype = stored_dtype(model)
    model.config.dtype = dtype
    model.save_pretrained(folder, state_dict={name: tensor.to(dtype) for name, tensor in state.items()})
    AutoTokenizer.from_pretrained(source.model, revision=source.revision).save_pretrained(folder)


def stored_dtype(model: Any) -> torch.dtype:
    """The type in which the model came from disk."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(model.config._name_or_path).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
