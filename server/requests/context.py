"""The one rule for a response that does not fit into the context beside its prompt: it is cut to what fits.

Agents ask for the same large `max_tokens` whatever they send; such a response ends as `length`, as one that reached its
`max_tokens` does. A prompt that leaves no room for a token is refused where it is rendered
(`server/serving/rendering.py`). Knows lengths, not tokens.
"""

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from ultrafuser.server.errors import InvalidRequest


def cut_to_context(request: ChatCompletionRequest | CompletionRequest, context_length: int) -> None:
    """Cut what is larger than the context, which vLLM would refuse; what the prompt leaves, vLLM cuts to by itself.

    Raises:
        InvalidRequest: `min_tokens` above `max_tokens`, as they were asked for.
    """
    asked = _max_tokens(request)
    if asked is not None and request.min_tokens > asked:
        raise InvalidRequest(f"min_tokens: must be 0 to max_tokens, {asked}, got {request.min_tokens}.", "min_tokens")
    for name in ("max_tokens", "max_completion_tokens"):
        if (number := request.__dict__.get(name)) is not None:
            setattr(request, name, min(number, context_length))
    kept = request.truncate_prompt_tokens
    if kept is not None:
        most = context_length - 1  # the response needs one
        request.truncate_prompt_tokens = most if kept == -1 else min(kept, most)


def cut_to_room(request: ChatCompletionRequest | CompletionRequest, room: int) -> None:
    """Cut `min_tokens`, too, to what the prompt leaves: vLLM would hold it against the `max_tokens` that it has cut."""
    request.min_tokens = min(request.min_tokens, room)


def _max_tokens(request: ChatCompletionRequest | CompletionRequest) -> int | None:
    # Not as attributes: to read the older name of the two warns.
    newer = request.__dict__.get("max_completion_tokens")
    older: int | None = request.__dict__["max_tokens"]
    return older if newer is None else newer
