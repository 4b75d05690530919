"""A batch's requests meet the server's own routes, never more at a time than the engine takes, and none is lost."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.exceptions import QueueOverflowError

from tests.server.scripted import SCRIPT, ScriptedEngine
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.server.access.admission import Admission
from ultrafuser.server.app import create_app
from ultrafuser.server.batch import sending
from ultrafuser.server.batch.lines import BatchRequest
from ultrafuser.server.batch.sending import Sending
from ultrafuser.server.health import Readiness
from ultrafuser.server.serving.serving import build_serving
from ultrafuser.server.settings import EngineStartError, ServerSettings

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

MESSAGES = [{"role": "user", "content": "Is it?"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Is it?", "max_tokens": 50},
    "/v1/responses": {"input": "Is it?"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 50, "model": "tiny"},
}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "ROOM_SECONDS", 0.01)


@pytest.fixture
def app(engine: ScriptedEngine, fusion: FusionConfig, info: FusedModelInfo) -> Any:
    settings = ServerSettings()
    serving = build_serving(engine, fusion, info, settings)
    return create_app(serving, settings, Readiness(is_warm=True), Admission(4))


def requests(*bodies: tuple[str, dict[str, Any]]) -> Iterator[BatchRequest]:
    return iter([BatchRequest(str(index), url, json.dumps(body).encode()) for index, (url, body) in enumerate(bodies)])


async def send(app: Any, asked: Iterator[BatchRequest], most: int = 4, has_failed: bool = False) -> dict[str, Any]:
    """Lines by custom_id."""
    lines: list[dict[str, Any]] = []
    await Sending(app, asked, lines.append, lambda: has_failed).run(most)
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


async def test_all_routes_answer_as_over_http(app: Any, client: Any) -> None:
    lines = await send(app, requests(*BODIES.items()))
    for index, (url, body) in enumerate(BODIES.items()):
        response, line = await client.post(url, json=body), lines[str(index)]
        assert line["error"] is None
        assert line["response"]["status_code"] == response.status_code == 200
        own, http = line["response"]["body"], response.json()
        assert own.keys() == http.keys()
        assert SCRIPT in json.dumps(own)
        assert line["response"]["request_id"] in own["id"]
        for texts in ("choices", "content"):
            assert own.get(texts) == http.get(texts)


async def test_a_refused_body_has_its_status_and_the_servers_error(app: Any, client: Any) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": MESSAGES, "temperature": 9}),
        ("/v1/messages", {"messages": []}),
    ]
    lines = await send(app, requests(*wrong))
    for index, (url, body) in enumerate(wrong):
        response = await client.post(url, json=body)
        assert lines[str(index)]["response"]["status_code"] == response.status_code == 400
        assert lines[str(index)]["response"]["body"]["error"] == response.json()["error"]
        assert lines[str(index)]["error"] is None


async def test_the_engines_ids_are_its_own(app: Any, engine: ScriptedEngine) -> None:
    """Elsewhere custom_ids were the engine's ids: two files with equal ones mixed answers."""
    asked = [BatchRequest("same", "/v1/chat/completions", json.dumps(BODIES["/v1/chat/completions"]).encode())]
    first, second = await asyncio.gather(send(app, iter(asked)), send(app, iter(asked)))
    ids = {lines["same"]["response"]["request_id"] for lines in (first, second)}
    assert len(ids) == 2
    assert "same" not in "".join(ids)


class Counting:
    """An application that answers when it is let go on; refuses, like a full engine, beyond its room."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.num_running = self.most_running = self.num_refused = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status = 503 if self.num_running >= self.room else 200
        self.num_refused += status == 503
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        await asyncio.sleep(0 if status == 503 else 0.005)
        self.num_running -= 1
        headers = [(b"x-request-id", b"r"), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})


async def test_no_more_are_in_flight_than_the_engine_takes() -> None:
    app = Counting(room=3)
    lines = await send(app, requests(*[("/v1/completions", {})] * 50), most=3)
    assert len(lines) == 50
    assert (app.most_running, app.num_refused) == (3, 0)


async def test_a_request_that_there_is_no_room_for_waits_for_the_others() -> None:
    """A request of several prompts, or of many tokens, takes more of the engine's room than one place."""
    app = Counting(room=2)
    lines = await send(app, requests(*[("/v1/completions", {})] * 30), most=8)
    assert app.num_refused > 0
    assert {line["response"]["status_code"] for line in lines.values()} == {200}
    assert len(lines) == 30


async def test_one_that_was_sent_first_and_got_in_last_waits_too() -> None:
    """It was taken for one that never fits: it takes longer to be read than the small one behind it, which got in."""
    places = 2

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal places
        wanted = json.loads((await receive())["body"])["n"]
        await asyncio.sleep(0.01 * wanted)
        status = 200 if wanted <= places else 503
        if status == 200:
            places -= wanted
            await asyncio.sleep(0.03)
            places += wanted
        headers = [(b"x-request-id", b"r"), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    lines = await send(app, requests(*[("/v1/completions", {"n": wanted}) for wanted in (2, 1, 3)]))
    assert [lines[name]["response"]["status_code"] for name in "012"] == [200, 200, 503]


async def test_one_that_never_finds_room_is_told_so(app: Any, engine: ScriptedEngine) -> None:
    engine.refusal = QueueOverflowError()
    lines = await send(app, requests(*[("/v1/completions", BODIES["/v1/completions"])] * 3))
    assert {line["response"]["status_code"] for line in lines.values()} == {503}
    assert len(lines) == 3


async def test_an_engine_that_stops_ends_the_batch_and_nothing_false_is_written(app: Any) -> None:
    """Its requests would all be lines with status 500."""

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"x-request-id", b"r"), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 500, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    lines: list[Any] = []
    with pytest.raises(EngineStartError, match="--resume goes on"):
        await Sending(failing, requests(*[("/v1/completions", {})] * 9), lines.append, lambda: True).run(4)
    assert lines == []
    # A fault of one request, of an engine that goes on, is that request's.
    assert (await send(failing, requests(("/v1/completions", {}))))["0"]["response"]["status_code"] == 500


async def test_lines_that_are_no_requests_are_not_sent(app: Any, engine: ScriptedEngine) -> None:
    lines = await send(app, iter([BatchRequest("a", problem=("invalid_url", "url: wrong"))]))
    assert lines["a"]["error"] == {"code": "invalid_url", "message": "url: wrong"}
    assert engine.prompts == []
