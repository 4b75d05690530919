"""What users of the library import. A name's module is loaded when the name is first asked for: alone, this loads
neither torch nor vLLM."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["FusedLLM", "UltraFuserForCausalLM", "__version__", "load_fusion"]

if TYPE_CHECKING:
    from ultrafuser.gating.model.fusion import load_fusion
    from ultrafuser.gating.model.reference import UltraFuserForCausalLM
    from ultrafuser.server.llm import FusedLLM
else:
    _MODULES = {
        "FusedLLM": "ultrafuser.server.llm",
        "UltraFuserForCausalLM": "ultrafuser.gating.model.reference",
        "load_fusion": "ultrafuser.gating.model.fusion",
    }

    def __getattr__(name: str) -> object:
        """A public name, from its module.

        Raises:
            AttributeError: there is no such name.
        """
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
