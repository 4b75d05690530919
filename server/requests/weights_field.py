"""The request's own field `gate_weights`: what it may be, and how it reaches the engine. Knows no weights."""

from pydantic import BaseModel

from ultrafuser.server.errors import InvalidRequest

GATE_WEIGHTS = "gate_weights"
"""Name of the field in requests (true or false) and in choices; also the engine's own name for the wish."""


def ask_for_weights(request: BaseModel) -> None:
    """Tell the engine of the wish, if the request has it.

    Raises:
        InvalidRequest: the field is neither true nor false.
    """
    wish = (request.model_extra or {}).get(GATE_WEIGHTS)
    if wish is not None and not isinstance(wish, bool):
        raise InvalidRequest(f"{GATE_WEIGHTS}: must be true or false.", GATE_WEIGHTS)
    if wish:
        request.vllm_xargs = {**(getattr(request, "vllm_xargs", None) or {}), GATE_WEIGHTS: True}  # type: ignore[attr-defined]


def is_asked(request: BaseModel) -> bool:
    """Whether a request that was let in asks for weights."""
    return bool((request.model_extra or {}).get(GATE_WEIGHTS))
