"""The request's own fields that ask what is told of each token: what they may be, and how they reach the engine. Knows
no tokens."""

from pydantic import BaseModel

from ultrafuser.server.errors import InvalidRequest

GATE_WEIGHTS = "gate_weights"
"""The gate's weights; name of the field in requests (true or false) and in choices, and the engine's own name."""

DRAFTED = "drafted"
"""Whether a token was drafted; likewise."""

MARK_FIELDS = (GATE_WEIGHTS, DRAFTED)


def ask_for_marks(request: BaseModel) -> None:
    """Tell the engine of the wishes, if the request has any.

    Raises:
        InvalidRequest: a field is neither true nor false.
    """
    extra = request.model_extra or {}
    for name in MARK_FIELDS:
        if extra.get(name) is not None and not isinstance(extra[name], bool):
            raise InvalidRequest(f"{name}: must be true or false.", name)
    if asked := asked_marks(request):
        own = getattr(request, "vllm_xargs", None) or {}
        request.vllm_xargs = own | dict.fromkeys(asked, True)  # type: ignore[attr-defined]


def asked_marks(request: BaseModel) -> list[str]:
    """Which of the fields a request that was let in asks for."""
    return [name for name in MARK_FIELDS if (request.model_extra or {}).get(name)]
