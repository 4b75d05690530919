"""`system_fingerprint`: a name for what is served, the same on every machine that serves the same."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ultrafuser import __version__
from ultrafuser.gating.model.fusion import FusionConfig
from ultrafuser.gating.model.gate_file import gate_digest
from ultrafuser.server.serving.installation import VLLM_VERSION

_HEX_DIGITS = 12


def fingerprint(fusion: FusionConfig, dtypes: Sequence[str]) -> str:
    """`fused-VERSION-HASH`; the hash is over this release, vLLM's, the specialists, the gate and what shapes tokens.

    `dtypes` are those that the specialists are computed in, in the file's order.

    Folders count by name: those of prepared weights are named by their content, wherever the cache is. The served
    name and the engine's sizes do not count; random weights do.
    """
    described = fusion.model_dump(mode="json", exclude={"name", "gate", "engine"})
    if fusion.engine.load_format == "dummy":
        described["weights"] = "random"
    for specialist, dtype in zip(described["specialists"], dtypes, strict=True):
        specialist |= {"model": Path(specialist["model"]).name, "dtype": dtype}
    gate = None if fusion.gate is None else gate_digest(fusion.gate)
    described |= {"versions": [__version__, VLLM_VERSION], "gate": gate}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return f"fused-{__version__}-{digest[:_HEX_DIGITS]}"
