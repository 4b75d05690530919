"""Constraints on a response (schemas, expressions, grammars) are tried out before the engine meets them.

xgrammar compiles in the engine's own process, where nothing can stop it: a schema of a few words can keep it busy for
ever, and an ambiguous grammar makes every step of every request wait for its mask. So each new constraint is compiled
and walked some tokens far in a process of its own (`grammar_worker.py`), which is ended when it takes too long.
Whatever goes wrong there is told to the client: a constraint that has not passed never reaches the engine.
Knows constraints and that process, neither requests nor the engine.
"""

import asyncio
import json
import sys
from collections import OrderedDict
from dataclasses import asdict, dataclass
from hashlib import sha256

from ultrafuser.server.errors import InvalidRequest

START_SECONDS = 120.0
"""How long the process may take to start: it imports torch."""

MAX_REMEMBERED = 1024
"""How many constraints that have passed are not tried again."""

_LINE_BYTES = 2**24


@dataclass(frozen=True)
class Constraint:
    """What a response has to follow."""

    kind: str
    """As `server/grammar/compiling.py` knows them."""

    text: str
    """The schema, expression, grammar or tag."""

    field: str
    """Where it stands in the request."""


@dataclass(frozen=True)
class Vocabulary:
    """Whose tokens a constraint allows or not."""

    tokenizer: str
    """The leader's, by path or name."""

    revision: str | None
    """The tokenizer's."""

    vocab_size: int
    """Width of the leader's logits."""

    num_shared_ids: int
    """Ids below this can be drawn."""

    stop_token_ids: tuple[int, ...]
    """Ids that end a response."""

    max_whitespace: int | None
    """Most characters of white space between tokens of JSON; None: any number."""


class GrammarCheck:
    """Tries constraints out, one at a time; the process starts with the first."""

    def __init__(self, vocabulary: Vocabulary, seconds: float) -> None:
        """`seconds` is the time one constraint may take."""
        self._vocabulary = vocabulary
        self._seconds = seconds
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._trials: set[asyncio.Task[str | None]] = set()

    async def check(self, constraint: Constraint | None) -> None:
        """Let a constraint pass, or not.

        Raises:
            InvalidRequest: it cannot be compiled, kept or fulfilled, takes too long, or more memory than it may; names
                its field.
        """
        if constraint is None:
            return
        line = json.dumps({"kind": constraint.kind, "text": constraint.text}).encode() + b"\n"
        reason = await self._verdict(line, sha256(line).digest())
        if reason is not None:
            raise InvalidRequest(f"{constraint.field}: {reason}", constraint.field)

    async def close(self) -> None:
        """End the process; the next constraint starts another."""
        if self._process is not None:
            process, self._process = self._process, None
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _verdict(self, line: bytes, digest: bytes) -> str | None:
        """What is wrong with a constraint; one that is known waits for no other."""
        if digest not in self._verdicts:
            await self._lock.acquire()  # a client that leaves while it waits has nothing tried
            # One that leaves later does not end the process, which others wait for: the trial gives the lock back.
            trial = asyncio.ensure_future(self._try_once(line, digest))
            self._trials.add(trial)
            trial.add_done_callback(self._forget)
            return await asyncio.shield(trial)
        self._verdicts.move_to_end(digest)
        return self._verdicts[digest]

    async def _try_once(self, line: bytes, digest: bytes) -> str | None:
        try:
            if digest not in self._verdicts:
                return await self._try(line, digest)
            return self._verdicts[digest]
        finally:
            self._lock.release()

    def _forget(self, trial: "asyncio.Task[str | None]") -> None:
        self._trials.discard(trial)
        if not trial.cancelled():
            trial.exception()  # looked at, also when nobody waits for it any more

    async def _try(self, line: bytes, digest: bytes) -> str | None:
        """What is wrong with a constraint, remembered if the process has said so."""
        if self._process is not None and self._process.returncode is not None:
            await self.close()  # it was ended by somebody else
        process = self._process or await self._start()
        try:
            verdict = await self._ask(process, line, self._seconds)
        except TimeoutError:
            return f"it takes more than {self._seconds:g} s to compile; simplify it"
        except ConnectionError:
            verdict = b""
        if not verdict:
            return "it ended the process that tried it out: it may need too much memory; simplify it"
        self._verdicts[digest] = json.loads(verdict)
        if len(self._verdicts) > MAX_REMEMBERED:
            self._verdicts.popitem(last=False)
        return self._verdicts[digest]

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        command = (
            sys.executable,
            "-m",
            "ultrafuser.server.requests.grammar_worker",
            json.dumps(asdict(self._vocabulary)),
        )
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=_LINE_BYTES)
        self._process = process
        if not await self._ask(process, b"", START_SECONDS):
            raise RuntimeError("the process that tries constraints out did not start; its last words are above")
        return process

    async def _ask(self, process: asyncio.subprocess.Process, line: bytes, seconds: float) -> bytes:
        """The process's answer; it is ended if none comes in time, which would be taken for the next one's."""
        assert process.stdin is not None
        assert process.stdout is not None
        answer = b""
        try:
            process.stdin.write(line)
            answer = await asyncio.wait_for(process.stdout.readline(), seconds)
        finally:
            if not answer:
                await self.close()
        return answer.strip()
