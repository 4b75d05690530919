"""What a kind of gate costs: the fused decode step with each against the step with the paper's.

Run: python -m benchmarks.gate_kinds [--quick]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.command import Options, run_benchmark, say
from benchmarks.decode_step import in_milliseconds, medians
from benchmarks.measure import Bar, Comparison, paired_ratio
from benchmarks.result import Question
from benchmarks.stepping import NUM_UNCOUNTED, Round, alternate
from benchmarks.workload import Request, conversations, render
from ultrafuser.gating.model.gate_kind import CHANGES, PAPER

if TYPE_CHECKING:
    from benchmarks.engines import StepEngine
    from ultrafuser.server.engine.worker.mixing import Mixer

QUESTION = Question(
    name="gate_kinds",
    text="What does a kind of gate cost? The fused decode step with each against the step with the paper's.",
    fused="step with this kind",
    baseline="step with the paper's",
    ratio="this kind / the paper's",
    method=(
        "One engine steps through one batch of conversations without drafts; in every other block of steps the paper's "
        "gate mixes. Gates are untrained, 512 wide; a smoothed one begins anew in each block. The ratio is the median "
        "over pairs of neighbouring blocks."
    ),
)
BAR = Bar(limit=1.02, direction="at most")
KINDS = (*CHANGES, "+".join(CHANGES))


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    batches: tuple[int, ...] = (1, 32)
    num_rounds: int = 16
    num_steps: int = 8


QUICK = Sizes(batches=(1, 2), num_rounds=2, num_steps=2)


class Side:
    """The engine with one gate in the place of its own; both sides are steps of one batch."""

    def __init__(self, engine: "StepEngine", mixer: "Mixer", leads: bool) -> None:
        """`leads`: this side starts and stops the batch."""
        self._engine, self._mixer, self._leads = engine, mixer, leads
        core = engine.llm.llm_engine.engine_core.engine_core
        self._runner = core.model_executor.driver_worker.worker.model_runner

    def start(self, requests: Sequence[Request]) -> None:
        """Take the requests, once for both sides."""
        self._take_over()
        if self._leads:
            self._engine.start(requests)

    def step(self) -> None:
        """One decode step."""
        if self._runner._mixer is not self._mixer:
            self._take_over()
        self._engine.step()

    def stop(self) -> None:
        """Forget the requests, once for both sides."""
        if self._leads:
            self._engine.stop()

    def _take_over(self) -> None:
        self._runner._mixer = self._mixer
        self._mixer._parts.begin()  # type: ignore[union-attr]


def mixer_of(kind: str, info: Any, num_requests: int) -> "Mixer":
    """A mixer with an untrained gate, to which each block's first row is the first of a response."""
    from ultrafuser.gating.model.gate import fresh_gate
    from ultrafuser.gating.model.gate_kind import GateKind
    from ultrafuser.server.engine.shared.row import Row
    from ultrafuser.server.engine.worker.gate_parts import GateParts
    from ultrafuser.server.engine.worker.mixing import Mixer

    class Parts(GateParts):
        def begin(self) -> None:
            self._begun: dict[str, int] = {}

        def of(self, hidden_SBD: Any, rows: Sequence[Row] | None = None) -> Any:
            if self._memories is not None and rows is not None:
                begun = self._begun
                rows = [
                    row._replace(position=row.position - begun.setdefault(row.request, row.position)) for row in rows
                ]
            return super().of(hidden_SBD, rows)

    gate = fresh_gate(info.hidden_sizes, kind=GateKind.parse(kind)).eval()
    return Mixer(Parts(gate, range(len(info.hidden_sizes)), num_requests, 1), info.num_shared_ids)


def measure(options: Options) -> list[Comparison]:
    """One comparison per kind and batch size."""
    # Imported here, so that `--help` and wrong options answer at once.
    from benchmarks.engines import fused_engine

    sizes = QUICK if options.quick else Sizes()
    fusion, info = options.load()
    prompts = render(fusion, conversations(max(sizes.batches)))
    engine = fused_engine(fusion)
    papers = Side(engine, mixer_of(PAPER, info, max(sizes.batches)), leads=not options.runs_fused)
    num_tokens = 2 * (sizes.num_rounds + 1) * (sizes.num_steps + NUM_UNCOUNTED) + 2
    comparisons = []
    for kind in KINDS:
        own = Side(engine, mixer_of(kind, info, max(sizes.batches)), leads=True)
        sides = own if options.runs_fused else None, papers if options.runs_baseline else None
        for batch in sizes.batches:
            requests = [Request(own_prompts, num_tokens) for own_prompts in prompts[:batch]]
            alternate(*sides, requests, 1, sizes.num_steps)  # warm-up
            rounds = alternate(*sides, requests, sizes.num_rounds, sizes.num_steps)
            comparisons.append(compare(kind, batch, rounds))
            say(f"{comparisons[-1].case}: ratio {comparisons[-1].ratio}")
    return comparisons


def compare(kind: str, batch: int, rounds: Sequence[Round]) -> Comparison:
    """The comparison of one kind and batch size, in milliseconds."""
    own = medians(r.fused for r in rounds)
    papers = medians(r.baseline for r in rounds)
    return Comparison(
        case=f"{kind}, batch {batch}",
        unit="ms per step",
        fused=in_milliseconds([t for r in rounds for t in r.fused]),
        baseline=in_milliseconds([t for r in rounds for t in r.baseline]),
        ratio=paired_ratio(own, papers) if own and papers else None,
        bar=BAR,
    )


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
