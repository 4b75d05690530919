"""Asks an OpenAI-compatible server, and keeps asking while asking again can help.

Connection errors, 408, 409, 429, 5xx and broken answers are tried again after a growing pause, or after the server's
own `Retry-After`, up to the time-out. Does not know what is asked, nor what it is for.
"""

import asyncio
import random
from collections.abc import Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from ultrafuser.gating.commands.address import check_endpoint
from ultrafuser.gating.commands.chat_completion import (
    Completion,
    NoCompletionError,
    RequestFailedError,
    content_of,
    read_completion,
    refusal,
    retry_after,
)
from ultrafuser.gating.errors import EndpointError

MAX_TRIES = 6
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
ENDPOINT_FIELDS = {"base_url", "api_key", "timeout_seconds", "concurrency"}
"""Of a command's settings: what an `Endpoint` is made with."""


class Endpoint:
    """An OpenAI API. An asynchronous context manager."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        timeout_seconds: float,
        concurrency: int,
        asks_again_when_late: bool = False,
    ) -> None:
        """
        Args:
            base_url: up to and with `/v1`.
            api_key: sent as a bearer token, if there is one.
            timeout_seconds: longest wait for one answer.
            concurrency: most connections at a time.
            asks_again_when_late: whether a request that took longer than that is tried again. It makes a slow server
                slower, and helps where a connection hangs.

        Raises:
            EndpointError: the address or the key is none.
        """
        check_endpoint(base_url, api_key)
        self._base_url = base_url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._asks_again_when_late = asks_again_when_late
        # One connection each: httpx's pool looks at every connection for every request, which at 64 takes more time
        # than all the rest of a call.
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        context = httpx.create_ssl_context()
        limits = httpx.Limits(max_connections=1)
        self._clients = [
            httpx.AsyncClient(headers=headers, timeout=None, limits=limits, verify=context) for _ in range(concurrency)
        ]
        self._idle: asyncio.LifoQueue[httpx.AsyncClient] = asyncio.LifoQueue()
        for client in self._clients:
            self._idle.put_nowait(client)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            await client.aclose()

    async def first_model(self) -> str:
        """The first model that the server names.

        Raises:
            EndpointError: it names none, or cannot be reached.
        """
        try:
            content = await self._send("GET", "/models", None)
            return str(content["data"][0]["id"])
        except (RequestFailedError, LookupError, TypeError) as error:
            reason = str(error) if isinstance(error, RequestFailedError) else "it names none"
            raise EndpointError(f"model: {self._base_url}/models cannot be asked ({reason}); name the model") from error

    async def complete(self, body: Mapping[str, Any]) -> Completion:
        """The answer to a request for a chat completion.

        Raises:
            RequestFailedError: there is none, and asking again in this run would not help.
            EndpointError: no request can succeed: nothing listens there, or key or model are refused.
        """
        return read_completion(await self._send("POST", "/chat/completions", body))

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        pause, reason = FIRST_PAUSE_SECONDS, ""
        for tries_left in reversed(range(MAX_TRIES)):
            wait = None
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    response = await self._request(method, path, body)
                if response.is_success:
                    return content_of(response, path)
                reason = refusal(response)
                wait = retry_after(response, self._timeout_seconds)
            except TimeoutError as error:
                reason = f"no answer within {self._timeout_seconds:g} s"
                if not self._asks_again_when_late:
                    raise RequestFailedError(reason) from error
            except httpx.ConnectError as error:
                if not tries_left:
                    raise EndpointError(
                        f"base_url: nothing answers at {self._base_url} ({error}); start the server and run this again,"
                        " answers so far are kept"
                    ) from error
                reason = f"cannot connect: {error}"
            except (httpx.RequestError, NoCompletionError) as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if tries_left:
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                # Spread, so that requests that failed together do not come back together.
                await asyncio.sleep(wait if wait is not None else pause * random.uniform(0.25, 0.5))
        raise RequestFailedError(f"{reason}, {MAX_TRIES} times")

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        client = await self._idle.get()
        try:
            return await client.request(method, self._base_url + path, json=body)
        finally:
            self._idle.put_nowait(client)


async def run_together(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait for all; the first error, or an interruption, ends the others too."""
    tasks = [asyncio.create_task(part) for part in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
