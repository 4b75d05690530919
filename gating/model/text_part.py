"""The text part of a model that also sees pictures, made a plain model folder of its own: the rest is left out.

Knows where each kind of such models keeps it, and files of weights; does not know fusions or engines. Weights are
renamed shard by shard, never loaded as a model.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.files import write_json
from ultrafuser.gating.model.cache import Artifact, Tick, fingerprint
from ultrafuser.gating.model.inspection import check_weights

WITH_VISION: Mapping[str, str] = {"gemma3": "Gemma3ForCausalLM"}
"""Kinds of models that see, whose text is fused; each with the architecture of its text part."""

# Part of the cache key: raise it when the same model is to give another folder.
_RECIPE = 1
# Both names that files have, of before Transformers 4.52 and since.
_TEXT_WEIGHT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.+)")
_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors")


def text_part(model: str, revision: str | None, key: str) -> Artifact | None:
    """What makes the folder, for a model folder or hub id of such a kind; None for all others.

    A model whose configuration cannot be read is for `inspect_fusion` to name.

    Raises:
        FusionError: weights that are quantised, or cut off; `key` is of the fusion file.
    """
    # Imported late: transformers takes a second that a command line's --help should not.
    from transformers import PreTrainedConfig

    try:
        fields: dict[str, Any] = PreTrainedConfig.get_config_dict(model, revision=revision)[0]
    except OSError:
        return None
    if fields.get("model_type") not in WITH_VISION:
        return None
    if fields.get("quantization_config"):
        raise FusionError(f"{key}: {model} sees and is quantised; name the model it was quantised from")
    folder = Path(model)
    check_weights(folder, key)
    identity: object = fingerprint(folder) if folder.is_dir() else [model, fields.get("_commit_hash")]
    return Artifact(
        name=f"{folder.name}-text",
        label=f"taking the text part of {folder.name}",
        parts={"recipe": _RECIPE, "model": identity},
        build=partial(_write, model, revision, key),
    )


def _write(model: str, revision: str | None, key: str, folder: Path, tick: Tick) -> None:
    from transformers import AutoConfig, AutoTokenizer

    source = _local_folder(model, revision, key)
    whole = AutoConfig.from_pretrained(source)
    text = whole.get_text_config()
    text.architectures = [WITH_VISION[whole.model_type]]
    text.dtype = text.dtype or whole.dtype
    text.save_pretrained(folder)
    places: dict[str, str] = {}
    files = sorted(source.glob("*.safetensors"))
    for index, file in enumerate(files):
        tick(index / len(files))
        places |= dict.fromkeys(_write_shard(file, folder), file.name)
    if not places:
        raise FusionError(
            f"{key}: {source} has no weights of a text part in *.safetensors; copy the whole model folder"
        )
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _local_folder(model: str, revision: str | None, key: str) -> Path:
    from huggingface_hub import snapshot_download

    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        raise FusionError(f"{key}: no model at {model!r}; correct the folder, id or revision") from error


def _write_shard(file: Path, folder: Path) -> list[str]:
    """The text part's weights of one file, in a file of that name; their names."""
    with safe_open(str(file), framework="pt") as weights:
        names = {own: name for name in weights.keys() if (own := _name(name)) is not None}  # noqa: SIM118
        tensors = {own: weights.get_tensor(name) for own, name in names.items()}
    if tensors:
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    return list(tensors)


def _name(weight: str) -> str | None:
    """What a weight is called in the text part alone; None: it is none of its."""
    if weight.endswith("lm_head.weight"):
        return "lm_head.weight"
    match = _TEXT_WEIGHT.fullmatch(weight)
    return f"model.{match[1]}" if match else None
