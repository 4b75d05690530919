"""How fast a fusion is here: one short generation through the engine, alone and eight at a time.

`measure` starts a process of its own, in which the rest runs; only there is vLLM imported. The engine's processes have
ended when it returns.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ultrafuser.gating.errors import UserError
from ultrafuser.gating.model.cache import cache_folder
from ultrafuser.server.settings import EngineStartError, vllm_environment
from ultrafuser.server.start.children import END_WITH_THE_PARENT, tied_children

if TYPE_CHECKING:
    from ultrafuser.server.engine.shared.report import StepReport
    from ultrafuser.server.llm import FusedLLM

NUM_TOKENS = 48
"""Of each response, if the context has room for them."""

NUM_WARM_UP_TOKENS = 8
BATCHES = (1, 8)
STOP_SECONDS = 30.0
"""How long the process may take to end by itself."""

_QUESTIONS = (
    "Why is the sky blue?",
    "Write a function that sorts a list.",
    "What is 12 times 7?",
    "Name three rivers of Europe.",
    "Explain what a loop does.",
    "How many minutes are in a day?",
    "Tell me about the sea.",
    "Reverse a string in Python.",
)
_MEASURE = "from ultrafuser.server.doctor.measuring import main; main()"


@dataclass(frozen=True)
class Speed:
    """One batch."""

    batch: int
    """Requests at once."""

    first_token_seconds: float
    """Until the first of them has a token, prompts included."""

    tokens_per_second: float
    """Of all requests together, after the first step that gave tokens."""

    num_steps: int
    num_tokens: int
    part_seconds: Mapping[str, float]
    """Mean time of each part of a step, as `/metrics` has them: "decode text", "gate", "mix"."""


class MeasuringError(RuntimeError):
    """Nothing was measured; says why."""


def measure(fusion: str, cache: str | None) -> list[Speed]:
    """Start the engine in a process of its own, generate, end it.

    Raises:
        MeasuringError: the engine has not started or has failed; its own lines are on stderr.
    """
    tie = END_WITH_THE_PARENT if sys.platform == "linux" else ""
    environ = {**os.environ, **vllm_environment(os.environ, "warning")}
    command = [sys.executable, "-c", tie + _MEASURE, fusion, str(cache_folder(cache))]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environ, process_group=0
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.read()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:
            if process.poll() is None:  # it hangs at its end, or nobody waits for it any more
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if not said:
        raise MeasuringError("the engine could not be measured; its own lines above say why")
    answer = json.loads(said)
    if "error" in answer:
        raise MeasuringError(answer["error"])
    return [Speed(**one) for one in answer["speeds"]]


def main() -> None:
    """What the process runs: prints one line of JSON, and has all that others print go to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    fusion, cache = sys.argv[1:]
    try:
        answer: dict[str, Any] = {"speeds": [asdict(one) for one in _measure(fusion, Path(cache))]}
    except (UserError, EngineStartError) as error:
        answer = {"error": str(error)}
    out.write(json.dumps(answer))
    out.close()


def _measure(fusion: str, cache: Path) -> list[Speed]:
    from ultrafuser.gating.model.fusion import load_fusion
    from ultrafuser.gating.model.materialize import materialize
    from ultrafuser.server.start.importing import import_part

    prepared = materialize(load_fusion(fusion), cache)
    with tied_children():
        llm: FusedLLM = import_part("ultrafuser.server.llm", "FusedLLM")(prepared)
    with llm:
        clock = StepClock()
        llm.steps.listen(clock.note)
        _generate(llm, _QUESTIONS[:1], NUM_WARM_UP_TOKENS)
        _generate(llm, _QUESTIONS, NUM_WARM_UP_TOKENS)
        speeds = []
        for batch in BATCHES:
            clock.begin()
            _generate(llm, _QUESTIONS[:batch], NUM_TOKENS)
            speeds.append(clock.speed(batch))
        return speeds


def _generate(llm: "FusedLLM", questions: Sequence[str], num_tokens: int) -> None:
    """Answers of exactly so many tokens, fewer where the context ends, sampled as the file says. Each run asks in other
    words than those before, so that none finds its prompt in the cache."""
    sampling = llm.get_default_sampling_params()
    sampling.max_tokens, sampling.ignore_eos = num_tokens, True
    conversations: list[Any] = [
        [{"role": "user", "content": f"{num_tokens + len(questions)}. {question}"}] for question in questions
    ]
    llm.chat(conversations, sampling, use_tqdm=False)


class StepClock:
    """What the steps of one batch report, and when."""

    def begin(self) -> None:
        """A batch is about to be sent."""
        self._begin = time.perf_counter()
        self._steps: list[tuple[float, int]] = []
        self._parts: defaultdict[str, list[float]] = defaultdict(list)

    __init__ = begin

    def note(self, report: "StepReport") -> None:
        """A listener of the engine's `steps`."""
        if len(report.weights_TS):
            self._steps.append((time.perf_counter(), len(report.weights_TS)))
        for span in report.spans:
            self._parts[" ".join(filter(None, (span.part, span.specialist)))].append(span.seconds)

    def speed(self, batch: int) -> Speed:
        """Of the batch that has ended."""
        (first, num_first), (last, _) = self._steps[0], self._steps[-1]
        num_tokens = sum(count for _, count in self._steps)
        rest = num_tokens - num_first
        return Speed(
            batch=batch,
            first_token_seconds=first - self._begin,
            tokens_per_second=rest / (last - first) if rest else 0.0,
            num_steps=len(self._steps),
            num_tokens=num_tokens,
            part_seconds={part: fmean(seconds) for part, seconds in self._parts.items()},
        )
