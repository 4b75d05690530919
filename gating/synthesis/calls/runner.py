"""Makes the calls of a stage, many at a time, and keeps what comes of each: a record, or a miss with its reason.

Everything happens in one event loop, so the store has one writer. An answer that cannot be read is asked for once
more, with the reason. Knows asking, checks and the store; does not know what the stages are for.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

from ultrafuser.gating.commands.chat_completion import Completion, RequestFailedError
from ultrafuser.gating.commands.endpoint import run_together
from ultrafuser.gating.errors import EndpointError
from ultrafuser.gating.synthesis.calls.asking import Asker, Tokens
from ultrafuser.gating.synthesis.calls.budget import BudgetSpentError
from ultrafuser.gating.synthesis.calls.text_quality import (
    REFUSAL,
    TRUNCATED,
    is_refusal,
    response_problem,
    text_problem,
)
from ultrafuser.gating.synthesis.stages.prompt import load_prompt
from ultrafuser.gating.synthesis.stages.records import (
    FAILED,
    REFUSED_BY_SERVER,
    UNPARSABLE,
    Item,
    Miss,
    Record,
    identify,
    seed_of,
)
from ultrafuser.gating.synthesis.stages.response_schemas import Entry, UnusableError
from ultrafuser.gating.synthesis.stages.store import Store
from ultrafuser.gating.synthesis.stages.structure import META_TOPICS, SUB_TOPICS
from ultrafuser.gating.synthesis.stages.task import Task

MOST_REFUSED = 20
"""Calls refused one after the other, after which a run ends."""
_DETAIL_CHARACTERS = 500
_OF_TASK = ("id", "stage", "meta_topic", "sub_topic", "parent", "root", "relation", "is_complex", "messages")
"""Of a record: what is its task's."""


class RejectedError(Exception):
    """An answer is not good enough."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class Runner:
    """Makes tasks into records."""

    def __init__(self, asker: Asker, store: Store, concurrency: int) -> None:
        self._asker = asker
        self._store = store
        self._concurrency = concurrency
        self._num_refused = 0

    async def make(self, tasks: Iterator[Task], on_end: Callable[[], None]) -> bool:
        """Make all tasks; `on_end` is called after each. Returns whether the budget ended it; open calls end first.

        Raises:
            EndpointError: no call can succeed; what was made is kept.
        """
        is_stopped = False

        async def work() -> None:
            nonlocal is_stopped
            for task in tasks:
                try:
                    await self._make(task)
                except BudgetSpentError:
                    is_stopped = True
                if is_stopped:
                    return
                on_end()

        await run_together([work() for _ in range(self._concurrency)])
        return is_stopped

    async def _make(self, task: Task) -> None:
        messages = task.render()
        used = Tokens()
        seed = self._seed(task)
        try:
            for attempt in range(2):
                completion, own = await self._asker.ask(task, messages, seed + attempt)
                used = used.plus(own)
                try:
                    entries = read_answer(task, completion, is_last=attempt == 1)
                    break
                except UnusableError as error:
                    messages = [*messages, *_repair(completion.text, str(error))]
            self._num_refused = 0
            self._store.append(self._record(task, entries, used, seed))
        except RejectedError as error:
            self._num_refused = 0
            self._store.append_miss(_miss(task, error.reason, error.detail, used, is_final=True))
        except RequestFailedError as error:
            reason = REFUSED_BY_SERVER if error.is_final else FAILED
            before = self._store.miss(task.id)
            self._store.append_miss(_miss(task, reason, str(error), used, is_final=False))
            if before is None or before.reason != REFUSED_BY_SERVER:  # a run begins with what the last one was refused
                self._check_refusals(error)
        except (BudgetSpentError, EndpointError, asyncio.CancelledError) as error:
            if used != Tokens():  # between the two tries
                detail = f"ended between two tries: {type(error).__name__}"
                self._store.append_miss(_miss(task, FAILED, detail, used, is_final=False))
            raise

    def _seed(self, task: Task) -> int:
        """For the first of two tries; another one after each rejection, or the same answer would come again."""
        return seed_of(task.id) + 2 * self._store.num_rejections(task.id)

    def _check_refusals(self, error: RequestFailedError) -> None:
        """What the server refuses to everybody is no matter of single calls."""
        self._num_refused = self._num_refused + 1 if error.is_final else 0
        if self._num_refused >= MOST_REFUSED:
            raise EndpointError(f"base_url: the server refuses every call ({error}); correct what it names")

    def _record(self, task: Task, entries: list[Entry], used: Tokens, seed: int) -> Record:
        items = [
            Item(id=identify(task.id, place), **{**asdict(entry), "reject": entry.reject or _problem(task, entry)})
            for place, entry in enumerate(entries)
        ]
        return Record(
            **{name: getattr(task, name) for name in _OF_TASK},
            domain=task.domain.name,
            prompt=task.prompt.identity if task.prompt else "",
            model=self._asker.model,
            seed=seed,
            items=tuple(items),
            prompt_tokens=used.prompt,
            completion_tokens=used.completion,
            time=round(time.time(), 3),
        )


def read_answer(task: Task, completion: Completion, *, is_last: bool) -> list[Entry]:
    """What an answer holds.

    Raises:
        UnusableError: it cannot be read, and may be asked for once more.
        RejectedError: it cannot be read for the last time, or is no good response.
    """
    text = completion.text.strip()
    if task.schema is None:
        limits, language = task.domain.limits, task.domain.language
        if problem := response_problem(text, completion.finish_reason, limits, language):
            raise RejectedError(problem, text)
        return [Entry(text)]
    try:
        return task.schema.read(text, may_lack=is_last)
    except UnusableError as error:
        if not is_last:
            raise
        reason = TRUNCATED if completion.finish_reason == "length" else REFUSAL if is_refusal(text) else UNPARSABLE
        raise RejectedError(reason, f"{error}: {text}") from error


def _problem(task: Task, entry: Entry) -> str:
    """Topics are only held to their length: too short to tell their language. Responses are checked already."""
    limits = task.domain.limits
    if task.schema is None:
        return ""
    if task.stage in (META_TOPICS, SUB_TOPICS):
        return text_problem(entry.text, 1, limits.topic, None)
    return text_problem(entry.text, limits.instruction_min, limits.instruction, task.domain.language)


def _repair(text: str, reason: str) -> list[dict[str, str]]:
    request = load_prompt("repair").render(reason=reason)
    return [{"role": "assistant", "content": text[:4000] or "{}"}, {"role": "user", "content": request}]


def _miss(task: Task, reason: str, detail: str, used: Tokens, *, is_final: bool) -> Miss:
    return Miss(
        id=task.id,
        stage=task.stage,
        domain=task.domain.name,
        reason=reason,
        detail=detail[:_DETAIL_CHARACTERS],
        is_final=is_final,
        prompt_tokens=used.prompt,
        completion_tokens=used.completion,
        time=round(time.time(), 3),
    )
