"""A request that cannot be sent to the engine leaves nothing behind."""

from types import SimpleNamespace
from typing import Any

import pytest

from ultrafuser.server.engine.client.async_llm import FusedAsyncLLM


async def test_a_request_that_cannot_be_sent_is_forgotten() -> None:
    known: set[str] = set()

    def forget(request_ids: Any, internal: bool) -> list[str]:
        known.difference_update(request_ids)
        return list(request_ids)

    async def cannot_encode(_request: object) -> None:
        raise OverflowError("cannot be encoded")

    async def nothing(*_: object) -> None:
        pass

    engine: Any = FusedAsyncLLM.__new__(FusedAsyncLLM)
    engine.log_requests = False
    engine.output_processor = SimpleNamespace(
        has_request=lambda _: True, add_request=lambda request, *_: known.add(request.request_id), abort_requests=forget
    )
    engine.engine_core = SimpleNamespace(
        add_request_async=cannot_encode, abort_requests_async=nothing, shutdown=lambda **_: None
    )
    with pytest.raises(OverflowError):
        await engine._add_request(SimpleNamespace(request_id="r"), None, None, 0, None)
    assert known == set()
