"""The server as the chat asks it: its model, and streamed answers with the gate's weights. Knows no terminal."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openai

from ultrafuser.gating.commands.address import check_endpoint
from ultrafuser.gating.errors import EndpointError
from ultrafuser.server.terminal.pieces import Token

_NO_KEY = "none"
"""The client wants one, whether the server does or not."""

_OTHER_FORM = (AttributeError, TypeError, LookupError)
"""What the client raises, or what it hands on does, where a server's JSON is not that of the API."""


class TurnError(Exception):
    """There is no whole answer to a message; one line says why."""


@dataclass(frozen=True)
class Event:
    """What one event of a stream adds to an answer."""

    text: str
    thought: str
    tokens: Sequence[Token]
    finish_reason: str | None


class ChatClient:
    """A server's model."""

    def __init__(self, base_url: str, api_key: str | None, model: str | None) -> None:
        """Ask the server what it serves; `model` is one of its names, else its first is taken.

        Raises:
            EndpointError: it cannot be asked, or has no such model.
        """
        check_endpoint(base_url, api_key)
        self._base_url = base_url
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key or _NO_KEY)
        try:
            cards = {card.id: card for card in self._client.models.list().data}
        except openai.AuthenticationError as error:
            raise EndpointError(f"api_key: the server refuses it ({told(error)}); correct it") from error
        except (*_OTHER_FORM, ValueError, openai.NotFoundError) as error:
            raise EndpointError(
                f"base_url: {base_url} is no OpenAI API: it has no list of models; most addresses end in /v1"
            ) from error
        except openai.OpenAIError as error:
            raise EndpointError(
                f"base_url: no server at {base_url} ({told(error)}); start one with `ultrafuser serve`, or add --demo"
            ) from error
        self.model = next(iter(cards), "") if model is None else model
        if self.model not in cards:
            names = _plain(", ".join(cards))
            raise EndpointError(f"model: {base_url} has no {self.model!r:.100}; it has {names or 'none':.300}")
        self.specialists: tuple[str, ...] = tuple(getattr(cards[self.model], "specialists", None) or ())
        """In the order of the weights; empty if the server is another one, without weights."""

    def answer(self, messages: Sequence[Mapping[str, str]]) -> Generator[Event, None, None]:
        """The events of a streamed answer; whoever closes the iterator ends the request.

        Raises:
            TurnError: the server refuses the request, cannot be reached, or the answer breaks off.
        """
        # The names of the tokens come with their log probabilities.
        marks: dict[str, Any] = {"logprobs": True, "extra_body": {"gate_weights": True}} if self.specialists else {}
        finish_reason = None
        try:
            create: Any = self._client.chat.completions.create
            stream = create(model=self.model, messages=messages, stream=True, **marks)
            with stream:
                for chunk in stream:
                    for choice in chunk.choices[:1]:
                        finish_reason = choice.finish_reason or finish_reason
                        yield _event(choice)
        except (openai.OpenAIError, ValueError) as error:
            raise TurnError(told(error)) from error
        except _OTHER_FORM as error:
            raise TurnError("what the server answers is no chat completion") from error
        if finish_reason is None:
            raise TurnError("the answer broke off")


def told(error: Exception) -> str:
    """What went wrong, in one line."""
    body = getattr(error, "body", None)
    said = str(body["message"]) if isinstance(body, dict) and body.get("message") else str(error)
    status = f"HTTP {error.status_code}: " if isinstance(error, openai.APIStatusError) else ""
    return f"{status}{_plain(' '.join(said.split())):.300}"


def _plain(text: str) -> str:
    """Without characters that steer a terminal: errors are shown as they are."""
    return "".join(mark if mark.isprintable() else "\ufffd" for mark in text)


def _whole(text: str | None) -> str:
    """Without half surrogate pairs, which JSON can have and no text: they can neither be shown nor sent back."""
    return (text or "").encode(errors="replace").decode()


def _event(choice: Any) -> Event:
    delta = choice.delta
    rows = (getattr(choice, "gate_weights", None) or {}).get("content") or []
    names = [entry.token for entry in (choice.logprobs and choice.logprobs.content) or []]
    tokens = [Token(name, tuple(row)) for name, row in zip(names, rows, strict=False)]
    return Event(_whole(delta.content), _whole(getattr(delta, "reasoning", None)), tokens, choice.finish_reason)
