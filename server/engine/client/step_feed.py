"""What a step did, as it arrives in the API process, for whoever counts it.

It travels with vLLM's own statistics of the step, in a field that plain vLLM has for statistics of encoder connectors,
which a fused engine has none of; it is taken out again before vLLM looks. It is sent whether or not vLLM's statistics
are switched off.

Counted are the tokens that vLLM counts as generated: of requests whose caller is still waiting. An engine that runs a
step ahead computes tokens that nobody gets.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import SchedulerStats

from ultrafuser.server.engine.shared.report import StepReport, unpack


class StepFeed:
    """Receives the reports in the API process."""

    def __init__(self, processor: OutputProcessor, specialists: Sequence[str]) -> None:
        """Stand between vLLM's output processor and its caller, from now on."""
        self._specialists = specialists
        self._waiting = processor.request_states
        self._listeners: list[Callable[[StepReport], None]] = []
        self._is_counted: list[bool] = []
        self._process, processor.process_outputs = processor.process_outputs, self._process_outputs
        self._update, processor.update_scheduler_stats = processor.update_scheduler_stats, self._take_report

    def listen(self, listener: Callable[[StepReport], None]) -> None:
        """Call back with each step's report; to be called before the first request."""
        self._listeners.append(listener)

    def _process_outputs(self, outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:
        self._is_counted += [output.request_id in self._waiting for output in outputs for _ in output.new_token_ids]
        return self._process(outputs, *args, **kwargs)

    def _take_report(self, stats: SchedulerStats | None) -> None:
        if stats is not None and stats.ec_connector_stats is not None:
            payload, stats.ec_connector_stats = stats.ec_connector_stats, None
            report = unpack(payload, self._specialists, self._is_counted)
            for listener in self._listeners:
                listener(report)
        self._is_counted.clear()
        self._update(stats)
