"""No route takes a body without the one check; a kind of request that has none cannot have a route."""

from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from pydantic import BaseModel

from ultrafuser.server.app import ROUTERS
from ultrafuser.server.errors import InvalidRequest
from ultrafuser.server.requests import checked_route
from ultrafuser.server.requests.checked_route import CheckedRoute

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

MESSAGES: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [{"messages": [{"role": "user", "content": "Hi"}]}],
    "/v1/completions": [{"prompt": "Hi"}],
    "/v1/messages": [MESSAGES | {"max_tokens": 5}],
    "/v1/messages/count_tokens": [MESSAGES],
    "/v1/responses": [{"input": "Hi"}],
    "/v1/gate/analyze": [{"text": "Hi there"}],
    "/tokenize": [{"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}],
    "/detokenize": [{"tokens": [76]}],
}
"""Right ones for every route that takes a body, one of each kind of request."""


def test_every_route_with_a_body_is_tried() -> None:
    routes = [route for router in ROUTERS for route in router.routes]
    assert {route.path for route in routes if getattr(route, "body_field", None) is not None} == set(BODIES)


@pytest.mark.parametrize("path", BODIES)
async def test_every_body_passes_through_the_one_check(
    client: httpx.AsyncClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for body in BODIES[path]:
        assert (await client.post(path, json=body)).status_code == 200

    def refuse(request: BaseModel, _bounds: Any) -> None:
        raise InvalidRequest(f"a {type(request).__name__} was checked", "everything")

    monkeypatch.setattr(checked_route, "check_request", refuse)
    for body in BODIES[path]:
        response = await client.post(path, json=body)
        assert response.status_code == 400
        assert "everything" in response.text


class Unknown(BaseModel):
    """Nobody has said what is to be checked of it."""


class Unread(BaseModel):
    """Nor of this."""


@pytest.mark.parametrize("model", [Unknown, Unknown | Unread], ids=["model", "union"])
def test_a_request_without_a_check_cannot_have_a_route(model: Any) -> None:
    async def answer(request: Any) -> None:
        """Never reached."""

    answer.__annotations__["request"] = model
    with pytest.raises(TypeError, match="/new: there is no check of a Unknown"):
        APIRouter(route_class=CheckedRoute).post("/new")(answer)
