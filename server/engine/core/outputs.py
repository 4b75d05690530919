"""What a step's outputs carry beside tokens, from the scheduler to the API process, in fields that vLLM has for others.

Knows the step's record and vLLM's outputs, not the schedule.
"""

from collections.abc import Iterable, Sequence

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from ultrafuser.server.engine.shared.report import pack
from ultrafuser.server.engine.shared.step import NONFINITE_OUTPUT, StepRecord


def add_marks(outputs: Sequence[EngineCoreOutput], step: StepRecord, wanting: set[str]) -> None:
    """Give their marks to the tokens of the requests that asked: the gate's weights, and whether they were drafted."""
    for output in outputs:
        if output.new_token_ids and output.request_id in wanting:
            output.routed_experts = step.marks_of(output.request_id, len(output.new_token_ids))


def add_report(outputs: dict[int, EngineCoreOutputs], step: StepRecord, culprits: Iterable[int]) -> None:
    """Send the report of a step along with its outputs, which name the tokens that were handed out.

    `culprits` are those of the requests that were ended, as bits.
    """
    own = next(iter(outputs.values()), None) or outputs.setdefault(0, EngineCoreOutputs())
    tokens = [(output.request_id, len(output.new_token_ids)) for output in own.outputs]
    own.scheduler_stats = own.scheduler_stats or SchedulerStats()
    own.scheduler_stats.ec_connector_stats = pack(step.rows_of(tokens), step.rounds_of(tokens), culprits, step.spans)


def nonfinite_end(request: Request) -> EngineCoreOutput:
    """The last output of a request that has ended since a value was not finite: no token."""
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        stop_reason=NONFINITE_OUTPUT,
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )
