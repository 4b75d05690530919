"""Rates are kept, budgets are not exceeded, and a budget that is too small for one more call ends a run."""

import asyncio
import time

import pytest

from ultrafuser.gating.synthesis.calls.budget import Account, BudgetSpentError, RateLimit
from ultrafuser.gating.synthesis.settings import Prices

PRICES = Prices(prompt=1.0, completion=4.0)


async def test_calls_come_evenly_at_the_rate():
    limit = RateLimit(per_minute=60 * 50)
    start = time.monotonic()
    await asyncio.gather(*(limit.take(1) for _ in range(11)))
    assert time.monotonic() - start > 0.19


async def test_what_was_not_used_can_be_used_by_others():
    limit = RateLimit(per_minute=60 * 100)
    await limit.take(3000)
    limit.give_back(2990)
    start = time.monotonic()
    await limit.take(1)
    assert 0.05 < time.monotonic() - start < 20, "30 s if it were lost"


async def test_without_a_rate_nobody_waits():
    limit = RateLimit(None)
    async with asyncio.timeout(60):
        for _ in range(1000):
            await limit.take(1e9)


def test_a_cost_is_prices_times_tokens():
    assert PRICES.cost(2_000_000, 500_000) == pytest.approx(4.0)


async def test_tokens_of_runs_before_count():
    account = Account(PRICES, 5.0, (1_000_000, 1_000_000))
    assert account.spent == pytest.approx(5.0)
    with pytest.raises(BudgetSpentError):
        await account.open(10, 1)


async def test_a_call_waits_while_others_may_leave_enough_and_gives_up_when_none_can():
    account = Account(PRICES, 4.4)
    order = []

    async def call(name: str, tokens: int) -> None:
        try:
            async with await account.open(0, 1_000_000) as opened:
                order.append(f"{name} begins")
                await asyncio.sleep(0.01)
                opened.tokens = (0, tokens)
        except BudgetSpentError:
            order.append(f"{name} is too much")

    await asyncio.gather(call("a", 100_000), call("b", 100_000), call("c", 100_000))
    assert order == ["a begins", "b begins", "c is too much"]
    assert account.spent == pytest.approx(0.8)


async def test_a_call_that_fails_gives_its_reservation_back():
    account = Account(PRICES, 4.4)
    with pytest.raises(KeyError):
        async with await account.open(0, 1_000_000):
            raise KeyError
    async with await account.open(0, 1_000_000):
        pass
    assert account.spent == 0
