"""With a key set, only probes, metrics and the playground's files answer without it; CORS answers named origins."""

import httpx
import pytest

from server.settings import ServerSettings

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
    """Two keys and one origin."""
    return ServerSettings(api_key=("first-key", "second-key"), allowed_origin=("http://page.example",))


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


async def test_a_host_header_opens_nothing(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models", headers={"Host": "test/health?"})
    assert response.status_code == 401


async def test_a_named_origin_is_answered_and_others_are_not(client: httpx.AsyncClient) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = await client.options("/v1/models", headers={"Origin": "http://page.example", **ask})
    assert allowed.headers["access-control-allow-origin"] == "http://page.example"
    other = await client.options("/v1/models", headers={"Origin": "http://evil.example", **ask})
    assert "access-control-allow-origin" not in other.headers
