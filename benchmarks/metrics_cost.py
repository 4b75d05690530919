"""What the metrics cost: the fused decode step with and without them.

Run: python -m benchmarks.metrics_cost [--quick]
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.command import Options, run_benchmark, say
from benchmarks.decode_step import QUICK, Sizes, in_milliseconds, medians
from benchmarks.measure import Bar, Comparison, paired_ratio
from benchmarks.result import Question
from benchmarks.stepping import Round, alternate
from benchmarks.workload import Request, random_requests

if TYPE_CHECKING:
    from benchmarks.engines import StepEngine

QUESTION = Question(
    name="metrics_cost",
    text="What do the metrics and the guard against NaN cost? The fused decode step with them against one without.",
    fused="step with metrics",
    baseline="step without",
    ratio="with / without",
    method=(
        "One engine steps through one batch; in every other block of steps nothing is looked for in the logits, timed, "
        "reported and counted. The counting, which the server does in another process, is part of the step here. The "
        "ratio is the median over pairs of neighbouring blocks."
    ),
)
BAR = Bar(limit=1.02, direction="at most")


class Switch:
    """Metrics that can be switched off from step to step; a step never knows more than one flag of it."""

    def __init__(self) -> None:
        self.is_on = True

    def install(self) -> None:
        """Come between the engine and its metrics, for good."""
        from ultrafuser.server.engine.core import scheduler
        from ultrafuser.server.engine.worker import mixing
        from ultrafuser.server.engine.worker.timing import StepClock

        for owner, name, off in (
            (mixing, "observe", _weights_alone),
            (mixing, "neutralize", _nothing),
            (StepClock, "measure", _untimed),
            (scheduler, "add_report", _nothing),
        ):
            setattr(owner, name, self._either(getattr(owner, name), off))

    def _either(self, on: Callable[..., Any], off: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (on if self.is_on else off)(*args)


@dataclass(frozen=True)
class Side:
    """The engine with its metrics on or off; both sides are steps of one batch."""

    engine: "StepEngine"
    switch: Switch
    is_on: bool
    leads: bool
    """Whether this side starts and stops the batch."""

    def start(self, requests: Sequence[Request]) -> None:
        """Take the requests, once for both sides."""
        if self.leads:
            self.engine.start(requests)

    def step(self) -> None:
        """One decode step."""
        self.switch.is_on = self.is_on
        self.engine.step()

    def stop(self) -> None:
        """Forget the requests, once for both sides."""
        if self.leads:
            self.engine.stop()


def measure(options: Options) -> list[Comparison]:
    """One comparison per batch size."""
    # Imported here, so that `--help` and wrong options answer at once.
    from benchmarks.engines import fused_engine
    from ultrafuser.server.serving.step_metrics import StepMetrics

    sizes = QUICK if options.quick else Sizes(num_rounds=24, num_steps=8)
    fusion, info = options.load()
    engine = fused_engine(fusion)
    engine.llm.steps.listen(StepMetrics(fusion.specialist_names).record)
    switch = Switch()
    switch.install()
    observed = Side(engine, switch, is_on=True, leads=True) if options.runs_fused else None
    blind = Side(engine, switch, is_on=False, leads=not options.runs_fused) if options.runs_baseline else None
    comparisons = []
    for seed, batch in enumerate(sizes.batches):
        num_tokens = 2 * sizes.num_rounds * (sizes.num_steps + 1) + sizes.prompt_length
        requests = random_requests(info, [sizes.prompt_length] * batch, [num_tokens] * batch, seed)
        alternate(observed, blind, requests, 1, sizes.num_steps)  # warm-up
        rounds = alternate(observed, blind, requests, sizes.num_rounds, sizes.num_steps)
        comparisons.append(compare(batch, rounds))
        say(f"{comparisons[-1].case}: ratio {comparisons[-1].ratio}")
    return comparisons


def compare(batch: int, rounds: Sequence[Round]) -> Comparison:
    """The comparison of one batch size, in milliseconds."""
    observed = medians(r.fused for r in rounds)
    blind = medians(r.baseline for r in rounds)
    return Comparison(
        case=f"batch {batch}",
        unit="ms per step",
        fused=in_milliseconds([t for r in rounds for t in r.fused]),
        baseline=in_milliseconds([t for r in rounds for t in r.baseline]),
        ratio=paired_ratio(observed, blind) if observed and blind else None,
        bar=BAR,
    )


def _weights_alone(weights_SB: Any, *_: Any) -> Any:
    """What would travel without metrics."""
    from torch import nn

    return nn.functional.pad(weights_SB, (0, 0, 0, 3)), None


def _nothing(*_: Any) -> None:
    """In the place of a call that has no result."""


def _untimed(*_: Any) -> AbstractContextManager[None]:
    return nullcontext()


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
