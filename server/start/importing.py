"""Loads the parts that need vLLM, which may be missing, or of another version. Does not know what they do."""

import atexit
import gc
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ultrafuser.server.settings import SettingsError


def import_part(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that imports vLLM.

    Raises:
        SettingsError: vLLM is not installed, or not in the version that the engine works with.
    """
    try:
        # At its end Python looks for cycles among all objects: with vLLM's ten seconds, for memory that is freed.
        atexit.register(gc.freeze)
        found: Callable[..., Any] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise SettingsError("vLLM is not installed; install ultrafuser[cuda], or ultrafuser[cpu]") from error
    except RuntimeError as error:  # the engine package's refusal of another version, by name
        raise SettingsError(str(error)) from error
    return found
