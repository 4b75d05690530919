"""What a step did, from the scheduler to whoever counts it in the API process.

It travels with vLLM's own statistics of the step, in a field that plain vLLM has for statistics of encoder connectors,
which a fused engine has none of; it is taken out again before vLLM looks. It is sent whether or not vLLM's statistics
are switched off.

Counted are the tokens that vLLM counts as generated: of requests whose caller is still waiting. An engine that runs a
step ahead computes tokens that nobody gets.

Shapes: S specialists, T tokens of one step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import SchedulerStats

from server.engine.shared.step import NUM_OTHER_MARKS, StepRecord
from server.engine.worker.timing import Span

GATE = "gate"
"""The gate's name among those whose values may be not finite."""


@dataclass(frozen=True)
class StepReport:
    """What one step of the engine did."""

    weights_TS: NDArray[np.float32]
    """The gate's weights of each token that was handed out."""

    is_overridden_T: NDArray[np.bool_]
    """Whether the mixture's best token is another than that of the specialist with the largest weight."""

    num_agreeing_T: NDArray[np.int64]
    """How many specialists agree on one best token."""

    nonfinite: list[str]
    """Whose values ended a request: specialists or the gate, once for each request."""

    spans: list[Span]
    """How long parts of a step took."""


def add_report(outputs: dict[int, EngineCoreOutputs], step: StepRecord, culprits: Iterable[int]) -> None:
    """Send the report of a step along with its outputs, which name the tokens that were handed out.

    `culprits` are those of the requests that were ended, as bits.
    """
    own = next(iter(outputs.values()), None) or outputs.setdefault(0, EngineCoreOutputs())
    marks_TX = step.rows_of([output.request_id for output in own.outputs if output.new_token_ids])
    own.scheduler_stats = own.scheduler_stats or SchedulerStats()
    own.scheduler_stats.ec_connector_stats = {
        "marks": marks_TX.tobytes(),
        "culprits": list(culprits),
        "spans": step.spans,
    }


class StepFeed:
    """Receives the reports in the API process."""

    def __init__(self, processor: OutputProcessor, specialists: Sequence[str]) -> None:
        """Stand between vLLM's output processor and its caller, from now on."""
        self._specialists = specialists
        self._listeners: list[Callable[[StepReport], None]] = []
        self._is_counted: list[bool] = []
        self._watch(processor)

    def listen(self, listener: Callable[[StepReport], None]) -> None:
        """Call back with each step's report; to be called before the first request."""
        self._listeners.append(listener)

    def _watch(self, processor: OutputProcessor) -> None:
        process, update = processor.process_outputs, processor.update_scheduler_stats

        def process_outputs(outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:
            waiting = processor.request_states
            self._is_counted += [output.request_id in waiting for output in outputs if output.new_token_ids]
            return process(outputs, *args, **kwargs)

        def update_scheduler_stats(stats: SchedulerStats | None) -> None:
            if stats is not None and stats.ec_connector_stats is not None:
                payload, stats.ec_connector_stats = stats.ec_connector_stats, None
                self._receive(payload)
            self._is_counted.clear()
            update(stats)

        processor.process_outputs = process_outputs
        processor.update_scheduler_stats = update_scheduler_stats

    def _receive(self, payload: dict[str, Any]) -> None:
        marks_TX = np.frombuffer(payload["marks"], np.float32).reshape(-1, len(self._specialists) + NUM_OTHER_MARKS)
        marks_TX = marks_TX[np.array(self._is_counted, dtype=bool)]
        report = StepReport(
            weights_TS=marks_TX[:, :-NUM_OTHER_MARKS],
            is_overridden_T=marks_TX[:, -3] > 0,
            num_agreeing_T=marks_TX[:, -2].astype(np.int64),
            nonfinite=[source for bits in payload["culprits"] for source in self._named(bits)],
            spans=[Span(*span) for span in payload["spans"]],
        )
        for listener in self._listeners:
            listener(report)

    def _named(self, bits: int) -> list[str]:
        return [source for index, source in enumerate([*self._specialists, GATE]) if bits >> index & 1]
