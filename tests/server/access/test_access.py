"""With a key set, only probes, metrics and the playground's files answer without it; hosts, origins and shares are as
named."""

from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from ultrafuser.server.settings import ServerSettings

OPEN = ["/health", "/ready", "/metrics"]
CLOSED = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
    ("OPTIONS", "/v1/models"),
    ("GET", "http://test//health"),
    ("GET", "/health/../v1/models"),
]


@pytest.fixture
def settings() -> ServerSettings:
    """Two keys with small shares, one origin, and names."""
    return ServerSettings(
        api_key=(SecretStr("first-key"), SecretStr("second-key")),
        requests_per_minute=3,
        allowed_origin=("http://page.example",),
        allowed_host=("test", "*.example.com"),
    )


@pytest.mark.parametrize("path", OPEN)
async def test_probes_and_metrics_need_no_key(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(("method", "path"), CLOSED)
async def test_everything_else_needs_a_key(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")


@pytest.mark.parametrize("key", ["first-key", "second-key"])
async def test_each_of_the_keys_opens(client: httpx.AsyncClient, key: str) -> None:
    response = await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "header", [b"", b"Bearer", b"Bearer ", b"Bearer wrong", b"Basic first-key", b"Bearer first-key ", b"Bearer \xe9"]
)
async def test_a_wrong_key_does_not(client: httpx.AsyncClient, header: bytes) -> None:
    response = await client.get("/v1/models", headers=[(b"Authorization", header)])
    assert response.status_code == 401


async def test_two_keys_at_once_do_not(client: httpx.AsyncClient) -> None:
    header = (b"Authorization", b"Bearer first-key")
    response = await client.get("/v1/models", headers=[header, header])
    assert response.status_code == 401


async def test_no_route_but_the_public_ones_answers_without_a_key(client: httpx.AsyncClient) -> None:
    schema = await client.get("/openapi.json", headers={"Authorization": "Bearer first-key"})
    operations = [(method, path) for path, own in schema.json()["paths"].items() for method in own]
    assert len(operations) > len(OPEN)
    for method, path in operations:
        response = await client.request(method, path, json={})
        assert (response.status_code == 401) == (path not in OPEN), path


async def test_a_used_up_key_is_refused_and_others_are_not(client: httpx.AsyncClient) -> None:
    async def ask(key: str) -> httpx.Response:
        return await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})

    assert [(await ask("first-key")).status_code for _ in range(4)] == [200, 200, 200, 429]
    refused = await ask("first-key")
    error: dict[str, Any] = refused.json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    balanced = {"Authorization": "Bearer first-key", "X-Other-Replicas": "true"}
    passed_on = await client.get("/v1/models", headers=balanced)
    assert (passed_on.status_code, passed_on.headers["x-refused"]) == (425, "429")
    assert int(passed_on.headers["retry-after"]) >= 1
    wrong = await client.get("/v1/models", headers=balanced | {"Authorization": "Bearer wrong-key"})
    assert wrong.status_code == 401  # as wrong elsewhere
    assert (await ask("wrong-key")).status_code == 401
    assert (await ask("second-key")).status_code == 200


@pytest.mark.parametrize("host", ["test", "TEST:8000", "api.example.com", "a.b.example.com:443"])
async def test_a_named_host_is_served(client: httpx.AsyncClient, host: str) -> None:
    response = await client.get("/v1/models", headers={"Host": host, "Authorization": "Bearer first-key"})
    assert response.status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "example.com", "testy", ""])
async def test_any_other_is_not(client: httpx.AsyncClient, host: str) -> None:
    response = await client.get("/v1/models", headers={"Host": host, "Authorization": "Bearer first-key"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "untrusted_host"
    assert (await client.get("/health", headers={"Host": host})).status_code == 200


async def test_a_host_header_opens_nothing(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models", headers={"Host": "test/health?"})
    assert response.status_code in (400, 401)


async def test_a_named_origin_is_answered_and_others_are_not(client: httpx.AsyncClient) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = await client.options("/v1/models", headers={"Origin": "http://page.example", **ask})
    assert allowed.headers["access-control-allow-origin"] == "http://page.example"
    other = await client.options("/v1/models", headers={"Origin": "http://evil.example", **ask})
    assert "access-control-allow-origin" not in other.headers
