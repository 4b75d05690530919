"""Asks a model for what a task wants: within rates and budget, and in the strictest format that the server takes.

A server that refuses JSON schemas is asked for JSON objects, and one that refuses these for plain text; the prompts
name the object in any case. Knows chat completions; does not know what becomes of answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ultrafuser.gating.commands.chat_completion import Completion, RequestFailedError
from ultrafuser.gating.commands.endpoint import Endpoint
from ultrafuser.gating.synthesis.calls.budget import CHARACTERS_PER_TOKEN, Account, RateLimit
from ultrafuser.gating.synthesis.settings import MakeSettings
from ultrafuser.gating.synthesis.stages.response_schemas import ResponseSchema
from ultrafuser.gating.synthesis.stages.task import Task

_NUM_FORMATS = 3
_FORMAT_WORDS = ("response_format", "json_schema", "json_object", "json schema", "structured", "guided", "grammar")


@dataclass(frozen=True)
class Tokens:
    """What the tries of one task have used."""

    prompt: int = 0
    completion: int = 0

    def plus(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)


class Asker:
    """One model at one endpoint."""

    def __init__(self, endpoint: Endpoint, model: str, settings: MakeSettings, account: Account) -> None:
        self.model = model
        self._endpoint = endpoint
        self._settings = settings
        self._account = account
        self._requests = RateLimit(settings.requests_per_minute)
        self._tokens = RateLimit(settings.tokens_per_minute)
        self._format = 0
        """0: JSON schemas, 1: JSON objects, 2: no format is asked for."""

    async def ask(self, task: Task, messages: Sequence[dict[str, str]], seed: int) -> tuple[Completion, Tokens]:
        """An answer, and what it used; `seed` may be any integer.

        Raises:
            RequestFailedError: there is none.
            BudgetSpentError: it might cost too much.
            EndpointError: no call can succeed.
        """
        settings = self._settings
        characters = sum(len(message["content"].encode()) for message in messages)
        max_tokens = settings.list_tokens if task.schema else settings.response_tokens
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": settings.temperature if task.schema else settings.response_temperature,
            "max_tokens": max_tokens,
            "seed": seed % 2**31,
        }
        async with await self._account.open(characters, max_tokens) as call:
            await self._requests.take(1)
            estimate = characters // CHARACTERS_PER_TOKEN + max_tokens
            await self._tokens.take(estimate)
            try:
                completion = await self._in_format(body, task.schema)
                guess = (characters // CHARACTERS_PER_TOKEN, len(completion.text) // CHARACTERS_PER_TOKEN)
                call.tokens = completion.usage or guess
                return completion, Tokens(*call.tokens)
            finally:
                self._tokens.give_back(estimate - sum(call.tokens))

    async def _in_format(self, body: dict[str, Any], schema: ResponseSchema | None) -> Completion:
        if schema is None:
            return await self._endpoint.complete(body)
        while True:
            tried = self._format
            try:
                return await self._endpoint.complete({**body, **_response_format(tried, schema)})
            except RequestFailedError as failure:
                refuses_format = failure.is_final and any(word in str(failure).lower() for word in _FORMAT_WORDS)
                if not refuses_format or tried == _NUM_FORMATS - 1:
                    raise
                self._format = max(self._format, tried + 1)


def _response_format(number: int, schema: ResponseSchema) -> dict[str, Any]:
    strict = {"type": "json_schema", "json_schema": {"name": schema.name, "schema": dict(schema.json_schema)}}
    formats: list[dict[str, Any]] = [{"response_format": strict}, {"response_format": {"type": "json_object"}}, {}]
    return formats[number]
