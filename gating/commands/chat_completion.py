"""Chat completions of an OpenAI API: what a server's response says, and what its refusal means. Sends nothing."""

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from ultrafuser.gating.errors import EndpointError
from ultrafuser.gating.json_text import parse_json

_AGAIN = frozenset({408, 409, 429})
_SETTINGS = {
    401: "api_key: the server refuses it",
    403: "api_key: the server refuses it",
    404: "model: the server has none",
}


class RequestFailedError(Exception):
    """A request has failed for good, as far as this run goes."""

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


@dataclass(frozen=True)
class Completion:
    """What is kept of a chat completion."""

    text: str

    finish_reason: str
    """As the server names it."""

    top_logprobs: tuple[tuple[str, float], ...] | None
    """Candidates for the first token that is not blank, with log-probabilities in nats; None if there are none."""

    usage: tuple[int, int] | None
    """Tokens of the prompt and of the completion, as the server counts them; None if it does not."""


class NoCompletionError(Exception):
    """A server's response is a success, and no chat completion."""


def read_completion(content: Any) -> Completion:
    """What is kept of a chat completion's JSON.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, OverflowError: it has another form.
    """
    choice = content["choices"][0]
    tokens = (choice.get("logprobs") or {}).get("content") or []
    # Many templates let an answer begin with a line break, which says nothing.
    first = next((token for token in tokens if token["token"].strip()), tokens[0] if tokens else {})
    candidates = first.get("top_logprobs") or []
    text = choice["message"].get("content") or ""
    if not isinstance(text, str):
        raise TypeError("content is no text")
    usage = content.get("usage")
    return Completion(
        text=text,
        finish_reason=str(choice.get("finish_reason")),
        top_logprobs=tuple((item["token"], float(item["logprob"])) for item in candidates) or None,
        usage=(int(usage["prompt_tokens"]), int(usage["completion_tokens"])) if usage else None,
    )


def content_of(response: httpx.Response, path: str) -> Any:
    """The JSON of a response that is a success.

    Raises:
        NoCompletionError: it is not JSON, or not a chat completion's.
    """
    try:
        content = parse_json(response.content)
        if path == "/chat/completions":
            read_completion(content)
        return content
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise NoCompletionError(f"not a chat completion: {response.text:.80}") from error


def refusal(response: httpx.Response) -> str:
    """Why a response is not a success, if asking again may help.

    Raises:
        RequestFailedError: it may not.
        EndpointError: it may not for any other request either.
    """
    reason = f"HTTP {response.status_code}: {_message(response):.300}"
    status = response.status_code
    if status in _SETTINGS:
        raise EndpointError(f"{_SETTINGS[status]} ({reason}); correct it")
    if status in _AGAIN or status >= 500:
        return reason
    raise RequestFailedError(reason, is_final=True)


def _message(response: httpx.Response) -> str:
    try:
        return str(parse_json(response.content)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return response.text


def retry_after(response: httpx.Response, longest: float) -> float | None:
    """Seconds of the header, which is a number or a date, up to a longest; None if there is none that can be read."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value).astimezone(UTC) - datetime.now(UTC)).total_seconds()
        except ValueError:
            return None
    return min(max(0.0, seconds), longest)
