"""A full or ending server turns requests away; a request whose time is up ends, and its client is told."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from ultrafuser.server.access.admission import Admission, AdmissionControl, default_max_requests
from ultrafuser.server.app import PUBLIC_PATHS


class Work:
    """An application that answers when it is told to, as a whole or as a stream, and notes how it ended."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.num_started = 0
        self.num_stopped = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_started += 1
        if scope["path"] == "/stream":
            await StreamingResponse(self._events(), media_type="text/event-stream")(scope, receive, send)
        elif scope["path"] == "/broken":
            raise KeyError("a fault")
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As vLLM's `with_cancellation`: race the work against the client."""
        done = asyncio.ensure_future(self.go_on.wait())
        left = asyncio.ensure_future(self._has_left(receive))
        await asyncio.wait({done, left}, return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        left.cancel()
        self.num_stopped += not self.go_on.is_set()
        await JSONResponse({"is": "done"})(scope, receive, send)

    async def _has_left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _events(self) -> Any:
        try:
            yield "data: one\n\n"
            await self.go_on.wait()
            yield "data: two\n\n"
        except asyncio.CancelledError:
            self.num_stopped += 1
            raise


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def admission() -> Admission:
    """Two requests at once."""
    return Admission(2)


def client(work: Work, admission: Admission, timeout_seconds: float | None = None) -> httpx.AsyncClient:
    app = AdmissionControl(work, admission, timeout_seconds, PUBLIC_PATHS)
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def begin(work: Work, requests: list[Any]) -> list[asyncio.Task[httpx.Response]]:
    """Requests that are running."""
    goal = work.num_started + len(requests)
    tasks = [asyncio.ensure_future(request) for request in requests]
    async with asyncio.timeout(5):
        while work.num_started < goal:
            await asyncio.sleep(0)
    return tasks


def rejections(reason: str) -> float:
    return REGISTRY.get_sample_value("fused_rejections_total", {"reason": reason}) or 0


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_the_surplus_is_refused_at_once_and_the_rest_finishes(work: Work, admission: Admission) -> None:
    before = rejections("queue_full")
    async with client(work, admission) as http:
        running = await begin(work, [http.post("/whole"), http.post("/stream")])
        refused = await asyncio.gather(*(http.post("/whole") for _ in range(5)))
        assert {code(response) for response in refused} == {(503, "server_overloaded")}
        assert {response.headers["retry-after"] for response in refused} == {"1"}
        assert (work.num_started, admission.num_running) == (2, 2)
        passed_on = await http.post("/whole", headers={"X-Other-Replicas": "true"})
        assert (passed_on.status_code, passed_on.headers["x-refused"]) == (425, "503")
        work.go_on.set()
        assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]
        assert admission.num_running == 0
        assert (await http.post("/whole")).status_code == 200
    assert rejections("queue_full") == before + 6


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/"])
async def test_probes_pass_a_full_and_an_ending_server(work: Work, path: str) -> None:
    admission = Admission(0)
    await admission.drain(0)
    work.go_on.set()
    async with client(work, admission) as http:
        assert (await http.get(path)).status_code == 200


async def test_a_failed_request_gives_its_place_back(work: Work, admission: Admission) -> None:
    async with client(work, admission) as http:
        with pytest.raises(KeyError):
            await http.post("/broken")
    assert admission.num_running == 0


class Client:
    """A connection over ASGI, whose request arrives piece by piece."""

    def __init__(self, app: AdmissionControl) -> None:
        self._pieces: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        scope: Scope = {"type": "http", "path": "/whole", "headers": [], "method": "POST"}
        self.task = asyncio.ensure_future(app(scope, self._pieces.get, self._send))

    def bring(self, body: bytes, more_body: bool) -> None:
        """A piece of the body arrives."""
        self._pieces.put_nowait({"type": "http.request", "body": body, "more_body": more_body})

    async def status(self) -> int:
        """The answer's status, once it is there."""
        await self.task
        return int(self.sent[0]["status"])

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


@pytest.fixture
def reading(work: Work, admission: Admission) -> AdmissionControl:
    """An application that reads a body before its work, two requests at once."""

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive()).get("more_body", False):
            pass
        if message["type"] == "http.request":
            await work(scope, receive, send)

    return AdmissionControl(read, admission, None, PUBLIC_PATHS)


def become_late_after(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a body may take, also of the requests that are on their way."""
    monkeypatch.setattr("ultrafuser.server.access.admission.MIN_ARRIVAL_SECONDS", seconds)


async def test_a_late_body_gives_its_place_to_the_next_request(
    reading: AdmissionControl, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rejections("slow_body"), rejections("queue_full")
    become_late_after(600, monkeypatch)
    first, second = Client(reading), Client(reading)
    first.bring(b"{", more_body=True)
    assert await Client(reading).status() == 503, "nobody is late yet"
    become_late_after(0, monkeypatch)
    third = Client(reading)
    assert await first.status() == 503
    work.go_on.set()
    for each in (second, third):
        each.bring(b"{}", more_body=False)
        assert await each.status() == 200
    assert (rejections("slow_body"), rejections("queue_full")) == (before[0] + 1, before[1] + 1)


async def test_a_request_that_has_arrived_keeps_its_place(
    reading: AdmissionControl, work: Work, admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_late_after(0, monkeypatch)
    clients = [Client(reading), Client(reading)]
    for each in clients:
        each.bring(b"{}", more_body=False)
    async with asyncio.timeout(60):
        while work.num_started < 2:
            await asyncio.sleep(0)
    assert await Client(reading).status() == 503
    work.go_on.set()
    assert [await each.status() for each in clients] == [200, 200]
    assert admission.num_running == 0


async def test_an_ending_server_waits_for_running_requests_and_takes_no_others(
    work: Work, admission: Admission
) -> None:
    async with client(work, admission) as http:
        running = await begin(work, [http.post("/whole"), http.post("/stream")])
        draining = asyncio.ensure_future(admission.drain(60))
        await asyncio.sleep(0)
        refused = await http.post("/whole")
        assert code(refused) == (503, "shutting_down")
        assert "retry-after" in refused.headers
        passed_on = await http.post("/whole", headers={"X-Other-Replicas": "true"})
        assert (passed_on.status_code, passed_on.headers["x-refused"]) == (425, "503")
        assert passed_on.json() == refused.json()
        assert not draining.done()
        work.go_on.set()
        assert await draining
        assert (await running[1]).text == "data: one\n\ndata: two\n\n"


async def test_an_idle_server_ends_at_once(admission: Admission) -> None:
    async with asyncio.timeout(1):
        assert await admission.drain(60)


async def test_at_the_deadline_work_stops_and_clients_are_told(work: Work, admission: Admission) -> None:
    async with client(work, admission) as http:
        balanced = http.post("/whole", headers={"X-Other-Replicas": "true"})  # something has run: no other is asked
        whole, stream = await begin(work, [balanced, http.post("/stream")])
        assert not await admission.drain(0.05)
        admission.end_all()
        assert await admission.drain(5)
        assert code(await whole) == (503, "shutting_down")
        first, error, done = (await stream).text.split("\n\n")[:3]
        assert (first, done) == ("data: one", "data: [DONE]")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert work.num_stopped == 2


async def test_a_request_that_takes_too_long_is_ended(work: Work, admission: Admission) -> None:
    async with client(work, admission, 0.05) as http:
        whole, stream = await asyncio.gather(http.post("/whole"), http.post("/stream"))
    assert code(whole) == (504, "request_timeout")
    assert whole.headers["x-should-retry"] == "false"
    assert '"code": "request_timeout"' in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
    assert (work.num_stopped, admission.num_running) == (2, 0)


async def test_a_request_in_time_is_left_alone(work: Work, admission: Admission) -> None:
    work.go_on.set()
    async with client(work, admission, 0.05) as http:
        assert (await http.post("/whole")).json() == {"is": "done"}
        await asyncio.sleep(0.1)
        assert (await http.post("/stream")).text == "data: one\n\ndata: two\n\n"


@pytest.mark.parametrize(("num_places", "most"), [(1, 2), (128, 256), (1024, 1024)])
def test_by_default_as_many_may_wait_as_are_computed(num_places: int, most: int) -> None:
    assert default_max_requests(num_places) == most
