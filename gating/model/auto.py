"""What Transformers' Auto classes find in a fused model's folder, and what they may ask of one without weights."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch

AUTO_MAP = {
    "AutoConfig": "modeling_ultrafuser.UltraFuserConfig",
    "AutoModelForCausalLM": "modeling_ultrafuser.UltraFuserForCausalLM",
}
"""Where `trust_remote_code=True` finds the classes: in a file of the folder itself."""

_SOURCE = '''\
"""The classes of this folder's model, for Transformers' Auto classes with trust_remote_code=True."""

from ultrafuser.gating.model.reference import UltraFuserConfig, UltraFuserForCausalLM

__all__ = ["UltraFuserConfig", "UltraFuserForCausalLM"]
'''


def write_source(folder: str | PathLike[Any]) -> None:
    """Put the file that `AUTO_MAP` names into a folder: it takes the classes from the installed ultrafuser."""
    (Path(folder) / "modeling_ultrafuser.py").write_text(_SOURCE, encoding="utf-8")


def loading_options(options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Of `from_pretrained`'s options for a fusion's folder: the device, and those of `from_fusion`.

    Raises:
        ValueError: an option that would be ignored.
    """
    options = {name: value for name, value in options.items() if name not in _OF_AUTO_CLASSES and value is not None}
    device = options.pop("device_map", None)
    if isinstance(device, dict) or device in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ValueError("device_map: name one device; a fused model is not spread over several here")
    dtype = options.pop("dtype", options.pop("torch_dtype", None))
    if dtype == "auto":
        raise ValueError("dtype: name one; a fusion's specialists need not be of one type")
    heeded = {"dtype": getattr(torch, dtype) if isinstance(dtype, str) else dtype}
    heeded["attn_implementation"] = options.pop("attn_implementation", None)
    if options:
        raise ValueError(f"{', '.join(sorted(options))}: no option for a fusion's folder")
    return device, {name: value for name, value in heeded.items() if value is not None}


_OF_AUTO_CLASSES = frozenset({
    "config", "trust_remote_code", "code_revision", "_from_auto", "adapter_kwargs", "revision", "cache_dir", "token",
    "local_files_only", "force_download", "subfolder", "proxies", "_commit_hash", "use_safetensors",
})  # fmt: skip
"""What Auto classes pass on of their own, and what says where a folder comes from: it is here already."""
