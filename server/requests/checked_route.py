"""The route of every request with a body: read strictly, checked, and worked on only while its client waits.

A route of this class cannot forget any of the three. Knows no route in particular and no engine.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, get_args

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from starlette.types import Receive

from ultrafuser.server.requests.bodies import OPENAI_FORM, BodyForm, read_request
from ultrafuser.server.requests.checks import check_request, is_checked
from ultrafuser.server.requests.limits import RequestBounds


class CheckedRoute(APIRoute):
    """A route whose body is strict JSON, checked by `check_request` within `app.state.bounds`."""

    form: ClassVar[BodyForm] = OPENAI_FORM

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, given a body that is read, validated and checked already.

        Raises:
            TypeError: there is no check for the body's model, or for a member of its union.
        """
        answer = super().get_route_handler()
        if self.body_field is None:
            raise TypeError(f"{self.path} takes no body: there is nothing to check")
        model: Any = self.body_field.field_info.annotation
        for kind in get_args(model) or (model,):
            if not is_checked(kind):
                raise TypeError(f"{self.path}: there is no check of a {kind.__name__}; register one")
        adapter: TypeAdapter[Any] = TypeAdapter(model)

        async def answer_checked(request: Request) -> Response:
            bounds: RequestBounds = request.app.state.bounds
            read = await read_request(request, adapter, self.form, bounds.limits)
            check_request(await read.json(), bounds)
            return await _while_the_client_waits(answer(read), read.receive)

        return answer_checked


async def _while_the_client_waits(answer: Coroutine[Any, Any, Response], receive: Receive) -> Response:
    """The answer; what works for it is cancelled when the client leaves, who then gets none. A stream looks itself."""
    work = asyncio.create_task(answer)
    leaving = asyncio.create_task(_leaving(receive))
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response()
    finally:
        work.cancel()
        work.add_done_callback(_look_at)
        leaving.cancel()


def _look_at(work: asyncio.Task[Response]) -> None:
    """An error that nobody waits for any more is none: asyncio would write it into the log."""
    if not work.cancelled():
        work.exception()


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
