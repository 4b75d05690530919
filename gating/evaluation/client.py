"""Asks an OpenAI-compatible server, and keeps asking while asking again can help.

Connection errors, 408, 409, 429, 5xx and broken answers are tried again after a growing pause, or after the server's
own `Retry-After`, up to the time-out. A request that takes longer than the time-out is not: it would only make a slow
server slower. Does not know what is asked, nor what it is for.
"""

import asyncio
import random
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from gating.evaluation.items import Answer, BenchmarkError, Request
from gating.evaluation.wire import (
    BrokenError,
    Completion,
    FailedError,
    check_address,
    content_of,
    read_completion,
    refusal,
    retry_after,
)

MAX_TRIES = 6
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0

# The server says no more than 20 candidates by its defaults, and so does OpenAI.
_NUM_CANDIDATES = 20


class ChatClient:
    """Chat completions of one model at temperature 0. An asynchronous context manager."""

    def __init__(self, base_url: str, *, api_key: str | None, timeout_seconds: float, concurrency: int) -> None:
        """
        Args:
            base_url: up to and with `/v1`.
            api_key: sent as a bearer token, if there is one.
            timeout_seconds: longest wait for one answer.
            concurrency: most connections at a time.

        Raises:
            BenchmarkError: the address is none.
        """
        self._base_url = check_address(base_url).rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=None,
            limits=httpx.Limits(max_connections=concurrency),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def first_model(self) -> str:
        """The first model that the server names.

        Raises:
            BenchmarkError: it names none, or cannot be reached.
        """
        try:
            content = await self._send("GET", "/models", None)
            return str(content["data"][0]["id"])
        except (FailedError, LookupError, TypeError) as error:
            reason = str(error) if isinstance(error, FailedError) else "it names none"
            raise BenchmarkError(
                f"model: {self._base_url}/models cannot be asked ({reason}); name the model"
            ) from error

    async def answer(self, request: Request, model: str, max_tokens: int) -> Answer:
        """Have a conversation; a failure is an answer too, with its reason.

        Raises:
            BenchmarkError: no request can succeed: nothing listens there, or key or model are refused.
        """
        messages: list[dict[str, str]] = []
        completions: list[Completion] = []
        error, is_final = None, True
        try:
            for turn in request.turns:
                messages.append({"role": "user", "content": turn})
                completion = await self._complete(request, model, max_tokens, messages)
                completions.append(completion)
                messages.append({"role": "assistant", "content": completion.text})
        except FailedError as failure:
            error, is_final = str(failure), failure.is_final
        return Answer(
            id=request.id,
            texts=tuple(completion.text for completion in completions),
            finish_reasons=tuple(completion.finish_reason for completion in completions),
            top_logprobs=completions[0].top_logprobs if completions else None,
            error=error,
            is_final=is_final,
            time=round(time.time(), 3),
        )

    async def _complete(
        self, request: Request, model: str, max_tokens: int, messages: list[dict[str, str]]
    ) -> Completion:
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": request.max_tokens or max_tokens,
        }
        logprobs = {"logprobs": True, "top_logprobs": _NUM_CANDIDATES} if request.wants_logprobs else {}
        try:
            content = await self._send("POST", "/chat/completions", {**body, **logprobs})
        except FailedError as failure:
            if not (logprobs and failure.is_final and "logprob" in str(failure)):
                raise
            content = await self._send("POST", "/chat/completions", body)  # a server without them
        return read_completion(content)

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """The JSON of the server's answer.

        Raises:
            FailedError: there is none, and asking again in this run would not help.
            BenchmarkError: as `answer`.
        """
        pause, reason = FIRST_PAUSE_SECONDS, ""
        for tries_left in reversed(range(MAX_TRIES)):
            wait = None
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    response = await self._http.request(method, self._base_url + path, json=body)
                if response.is_success:
                    return content_of(response, path)
                reason = refusal(response)
                wait = retry_after(response, self._timeout_seconds)
            except TimeoutError as error:
                raise FailedError(f"no answer within {self._timeout_seconds:g} s") from error
            except httpx.ConnectError as error:
                if not tries_left:
                    raise BenchmarkError(
                        f"base_url: nothing answers at {self._base_url} ({error}); start the server and run this again,"
                        " answers so far are kept"
                    ) from error
                reason = f"cannot connect: {error}"
            except (httpx.RequestError, BrokenError) as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if tries_left:
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                # Spread, so that requests that failed together do not come back together.
                await asyncio.sleep(wait if wait is not None else pause * random.uniform(0.25, 0.5))
        raise FailedError(f"{reason}, {MAX_TRIES} times")
