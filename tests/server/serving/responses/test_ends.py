"""A stream that the server ends, at its deadline or since it shuts down, ends as failed; it is the API's own end."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.response_events import parsed
from tests.server.scripted import ScriptedEngine
from tests.server.serving.responses.test_response_stream import check
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.server.access.admission import Admission
from ultrafuser.server.app import create_app
from ultrafuser.server.errors import ApiError, ShuttingDown, TimedOut
from ultrafuser.server.health import Readiness
from ultrafuser.server.serving.serving import build_serving
from ultrafuser.server.settings import ServerSettings

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

NUM_TOLD = 3


class Stalling(ScriptedEngine):
    """Stops for ever behind some tokens; `has_stalled` says that it is there, `has_left` that its caller has gone."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.has_stalled = asyncio.Event()
        self.has_left = False

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """The first outputs."""
        outputs = super().generate(*args, **kwargs)
        try:
            for _ in range(NUM_TOLD):
                yield await anext(outputs)
            self.has_stalled.set()
            await asyncio.Event().wait()
        finally:
            self.has_left = True


async def ended(
    vllm_config: Any, fusion: FusionConfig, info: FusedModelInfo, error: ApiError, *, stream: bool
) -> httpx.Response:
    """The answer to a request that is ended with an error when some of its tokens are there; the engine's part ends."""
    engine, settings, admission = Stalling(vllm_config), ServerSettings(), Admission()
    app = create_app(build_serving(engine, fusion, info, settings), settings, Readiness(is_warm=True), admission)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = asyncio.ensure_future(client.post("/v1/responses", json={"input": "Hi", "stream": stream}))
        await engine.has_stalled.wait()
        await asyncio.sleep(0.1)  # the tokens reach the client
        admission.end_all(error)
        response = await answer
    assert engine.has_left
    return response


ENDS = pytest.mark.parametrize("error", [ShuttingDown(), TimedOut("It was late.")], ids=["drain", "deadline"])


@ENDS
async def test_a_stream_that_is_ended_tells_so_and_what_there_was(
    vllm_config: Any, fusion: FusionConfig, info: FusedModelInfo, error: ApiError
) -> None:
    events = parsed((await ended(vllm_config, fusion, info, error, stream=True)).text)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert (events[-2]["code"], events[-2]["message"]) == (error.code, error.message)
    response = check(events)
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"]
    assert response["error"] == {"code": "server_error", "message": error.message}


@ENDS
async def test_a_whole_answer_that_is_ended_is_an_error(
    vllm_config: Any, fusion: FusionConfig, info: FusedModelInfo, error: ApiError
) -> None:
    response = await ended(vllm_config, fusion, info, error, stream=False)
    assert (response.status_code, response.json()["error"]["code"]) == (error.status, error.code)
