"""Many clients at once, some of which leave: every request has an end, and the server is as before."""

import httpx

from benchmarks.footprint import look_at
from benchmarks.storm import Storm
from tests.e2e.process import ServerProcess, wait_for

NUM_REQUESTS = 60


async def test_no_request_is_lost_and_none_stays(server: ServerProcess) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        storm = Storm(client, num_concurrent=12, leaving_share=0.3)
        await storm.send(NUM_REQUESTS)
    assert (storm.counts.total, storm.counts.lost, storm.counts.refused) == (NUM_REQUESTS, 0, 0)
    assert min(storm.counts.completed, storm.counts.left) > 5
    wait_for(lambda: look_at(server.process.pid, server.url, NUM_REQUESTS).is_idle, "nothing runs, waits or is held")
