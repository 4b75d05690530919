"""What calls may use: requests and tokens a minute, and money. Knows numbers only, no requests."""

import asyncio
import time
from types import TracebackType
from typing import Self

from ultrafuser.gating.synthesis.settings import Prices

CHARACTERS_PER_TOKEN = 4
"""Of English with common tokenizers; for estimates before the server has counted."""

_CHARACTERS_PER_TOKEN_AT_LEAST = 2


class BudgetSpentError(Exception):
    """The next call might cost more than what is left."""


class RateLimit:
    """So much a minute, evenly: whoever comes too early waits for its turn."""

    def __init__(self, per_minute: float | None) -> None:
        """None: no limit."""
        self._seconds_per_unit = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def take(self, amount: float) -> None:
        """Wait until so much may be used."""
        if not self._seconds_per_unit:
            return
        now = time.monotonic()
        turn = max(self._next, now)
        self._next = turn + amount * self._seconds_per_unit
        await asyncio.sleep(turn - now)

    def give_back(self, amount: float) -> None:
        """Of what was taken, so much was not used; negative: more was."""
        self._next -= amount * self._seconds_per_unit


class Account:
    """What was spent, and what calls under way may yet cost."""

    def __init__(self, prices: Prices, budget: float | None, tokens: tuple[int, int] = (0, 0)) -> None:
        """`tokens`: of prompts and completions, used before. `budget`: for all, with those; None: no limit."""
        self.prices = prices
        self.prompt_tokens, self.completion_tokens = tokens
        self._budget = budget
        self._reserved = 0.0
        self._under_way = 0
        self._changed = asyncio.Condition()

    @property
    def spent(self) -> float:
        """Cost of all tokens so far."""
        return self.prices.cost(self.prompt_tokens, self.completion_tokens)

    async def open(self, characters: int, max_tokens: int) -> "Call":
        """Reserve what a call may cost at most; waits while calls under way may leave enough.

        Raises:
            BudgetSpentError: it is too much.
        """
        most = self.prices.cost(characters / _CHARACTERS_PER_TOKEN_AT_LEAST, max_tokens)
        async with self._changed:
            while self._budget is not None and self.spent + self._reserved + most > self._budget:
                if not self._under_way:
                    raise BudgetSpentError
                await self._changed.wait()
            self._reserved += most
            self._under_way += 1
        return Call(self, most)

    async def close(self, reserved: float, prompt_tokens: int, completion_tokens: int) -> None:
        async with self._changed:
            self._reserved -= reserved
            self._under_way -= 1
            self.prompt_tokens += prompt_tokens
            self.completion_tokens += completion_tokens
            self._changed.notify_all()


class Call:
    """A reservation, given back at the end of its `async with`; whoever knows the call's tokens notes them."""

    def __init__(self, account: Account, reserved: float) -> None:
        self._account = account
        self._reserved = reserved
        self.tokens = (0, 0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._account.close(self._reserved, *self.tokens)
