"""Sends the requests of a batch through an application in this process, as many at a time as its engine takes.

Ids are the application's own: two batches with equal `custom_id`s never meet. Knows ASGI and statuses, no engine.
"""

import asyncio
import random
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import httpx
from starlette.types import ASGIApp

from ultrafuser.gating.commands.endpoint import run_together
from ultrafuser.server.batch.lines import BatchRequest, answered, not_sent
from ultrafuser.server.settings import EngineStartError

ROOM_SECONDS = 0.2
"""After which a request that found the engine full is sent again, on the mean."""

MOST_REFUSALS = 3
"""After which a request that no other is in the way of counts as one that never fits."""

_HEADERS = {"Content-Type": "application/json"}


class Sending:
    """One pass through the requests; answers are written in the order in which they come."""

    def __init__(
        self,
        app: ASGIApp,
        requests: Iterator[BatchRequest],
        write: Callable[[dict[str, Any]], None],
        has_engine_failed: Callable[[], bool],
    ) -> None:
        self._app = app
        self._requests = requests
        self._write = write
        self._has_engine_failed = has_engine_failed
        self._num_sent = self._num_taken = 0

    async def run(self, most_at_once: int) -> None:
        """Send all of them.

        Raises:
            EngineStartError: the engine has failed; what it owes is not written.
            CommandError: a file cannot be read, or written.
        """
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:
            await run_together([self._work(client) for _ in range(most_at_once)])

    async def _work(self, client: httpx.AsyncClient) -> None:
        for request in self._requests:  # all workers take from one iterator
            if request.problem is not None:
                self._write(not_sent(request))
                continue
            response = await self._ask(client, request)
            if response.is_server_error and self._has_engine_failed():
                raise EngineStartError(
                    "the engine has stopped, and has said why; the same command with --resume goes on"
                )
            self._write(answered(request, response.status_code, response.headers["x-request-id"], response.json()))

    async def _ask(self, client: httpx.AsyncClient, request: BatchRequest) -> httpx.Response:
        """The response; one that there is no room for waits until others have ended.

        It is refused for good when it was so `MOST_REFUSALS` times while no other had the room: none is in hand, and
        none has got in meanwhile. Once may be chance: two that are refused can have been in each other's way.
        """
        num_refused = 0
        while True:
            num_before = self._num_taken
            self._num_sent += 1
            try:
                response = await client.post(request.url, content=request.body, headers=_HEADERS)
            finally:
                self._num_sent -= 1
            if response.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                self._num_taken += 1
                return response
            num_refused += not self._num_sent and self._num_taken == num_before
            if num_refused == MOST_REFUSALS:
                return response
            await asyncio.sleep(ROOM_SECONDS * random.uniform(0.5, 1.5))  # those that were refused together part
