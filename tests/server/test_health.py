"""A busy engine without steps is noticed, and so is its recovery; an idle one is left alone."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from ultrafuser.server.health import Heartbeat, Readiness, StallWatch

STALL_SECONDS = 0.2
WAIT_SECONDS = 5 * STALL_SECONDS


class Engine:
    """Has so many requests, and answers questions unless it is stopped."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.errored = False
        self.lives = asyncio.Event()
        self.lives.set()

    def get_num_unfinished_requests(self) -> int:
        return self.num_requests

    async def is_paused(self) -> bool:
        await self.lives.wait()
        if self.errored:
            raise RuntimeError("nothing answers")
        return False


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def heartbeat() -> Heartbeat:
    return Heartbeat()


@pytest.fixture
async def readiness(engine: Engine, heartbeat: Heartbeat) -> AsyncIterator[Readiness]:
    """Kept up to date while the test runs."""
    readiness = Readiness(is_warm=True)
    task = asyncio.create_task(StallWatch(engine, heartbeat, readiness, STALL_SECONDS).run())
    yield readiness
    task.cancel()


async def until(readiness: Readiness, is_stalled: bool) -> None:
    async with asyncio.timeout(5):
        while readiness.is_stalled != is_stalled:
            await asyncio.sleep(STALL_SECONDS / 10)


async def test_an_idle_engine_is_not_stalled(readiness: Readiness) -> None:
    await asyncio.sleep(WAIT_SECONDS)
    assert readiness.obstacle(engine_errored=False) is None


async def test_work_after_a_long_rest_is_no_stall(readiness: Readiness, engine: Engine) -> None:
    await asyncio.sleep(WAIT_SECONDS)
    engine.num_requests = 1
    await asyncio.sleep(STALL_SECONDS / 4)
    assert not readiness.is_stalled


async def test_a_busy_engine_without_steps_is_stalled_until_it_makes_one(
    readiness: Readiness, engine: Engine, heartbeat: Heartbeat
) -> None:
    engine.num_requests = 3
    await until(readiness, True)
    assert readiness.obstacle(engine_errored=False) == "the engine has work, but makes no steps"
    heartbeat.beat()
    await until(readiness, False)


async def test_requests_that_time_out_do_not_make_a_stopped_engine_ready(readiness: Readiness, engine: Engine) -> None:
    engine.num_requests = 3
    engine.lives.clear()
    await until(readiness, True)
    engine.num_requests = 0
    await asyncio.sleep(WAIT_SECONDS)
    assert readiness.is_stalled
    engine.lives.set()
    await until(readiness, False)


async def test_the_watch_ends_with_its_engine(engine: Engine, heartbeat: Heartbeat) -> None:
    engine.num_requests = 3
    engine.errored = True
    readiness = Readiness(is_warm=True)
    async with asyncio.timeout(5):
        await StallWatch(engine, heartbeat, readiness, STALL_SECONDS).run()
    assert readiness.is_stalled
