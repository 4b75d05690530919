"""What split placement costs: two specialists on a core each, against the slower of the two alone on its core.

Run: python -m benchmarks.placement [--quick]
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.command import Options, run_benchmark, say
from benchmarks.decode_step import in_milliseconds
from benchmarks.environment import num_cores
from benchmarks.measure import Bar, Comparison, Measured, paired_ratio
from benchmarks.result import Question
from benchmarks.servers import free_port
from benchmarks.workload import Request, random_requests
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig, inspect_fusion
from ultrafuser.gating.model.schema import FRESH_GATE

if TYPE_CHECKING:
    from benchmarks.engines import StepEngine

QUESTION = Question(
    name="placement",
    text="Is a fused step as fast as its slowest specialist, if each has a device of its own?",
    fused="split step",
    baseline="slower of two single steps",
    ratio="split step / slower of two single steps",
    method=(
        "The first two specialists, one core each (the split engine's scheduler, a process of its own, takes what is "
        "left). The split engine's blocks of steps take turns with blocks in which two plain engines, one on either "
        "core, run at the same time; of these the slower counts. The ratio is the "
        "median over pairs of neighbouring blocks. Waiting processes leave the processor to the others, as vLLM's do "
        "after a second. Exchange: what it takes at the leader, once the other specialist is ready, against its bytes "
        "over the bandwidth of large tensors between two processes."
    ),
)
BAR = Bar(limit=1.06, direction="at most")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    batches: tuple[int, ...] = (1, 8)
    prompt_length: int = 64
    num_rounds: int = 12
    num_steps: int = 12


QUICK = Sizes(batches=(1,), prompt_length=16, num_rounds=2, num_steps=2)


def measure(options: Options) -> list[Comparison]:
    """One comparison per batch size, and the exchange of each.

    Raises:
        SystemExit: fewer than two cores, or fewer than two specialists.
    """
    fusion, _ = options.load()
    if num_cores() < 2 or len(fusion.specialists) < 2:
        raise SystemExit("placement: needs two cores and two specialists")
    pair = fusion.model_copy(update={"specialists": fusion.specialists[:2], "gate": FRESH_GATE})
    pair = pair.model_copy(update={"engine": pair.engine.model_copy(update={"exchange": None})})
    info, sizes = inspect_fusion(pair), QUICK if options.quick else Sizes()
    bandwidth = link_bandwidth()
    say(f"placement: {bandwidth / 1e9:.2f} GB/s between two processes")
    comparisons = []
    with ExitStack() as stack:
        alone = [stack.enter_context(_alone(pair, info, core)) for core in range(2)] if options.runs_baseline else []
        split = stack.enter_context(_split(pair)) if options.runs_fused else None
        for batch in sizes.batches:
            num_tokens = (sizes.num_rounds + 1) * (sizes.num_steps + 1) + sizes.prompt_length
            requests = random_requests(info, [sizes.prompt_length] * batch, [num_tokens] * batch, seed=batch)
            blocks = list(_blocks(split, alone, requests, sizes))[1:]  # the first is a warm-up
            comparisons.append(_compare(batch, blocks))
            if split is not None:
                num_bytes = batch * info.num_shared_ids * _bytes_of_a_logit(pair)
                comparisons.append(_exchange(batch, split.exchanges, num_bytes / bandwidth))
    return comparisons


class Split:
    """The fused engine whose specialists have ranks of their own, and what its exchanges took."""

    def __init__(self, engine: "StepEngine") -> None:
        self.engine = engine
        self.exchanges: list[float] = []
        engine.llm.steps.listen(self._hear)

    def _hear(self, report: Any) -> None:
        self.exchanges += [span.seconds for span in report.spans if span.part == "exchange"]


@dataclass
class Block:
    """Seconds of each step: of the split engine, and of each specialist alone."""

    split: list[float]
    alone: list[list[float]]


def _blocks(
    split: Split | None, alone: Sequence[Connection], requests: Sequence[Request], sizes: Sizes
) -> Iterator[Block]:
    """Blocks of steps that take turns; each begins with a step that is not counted."""
    if split is not None:
        split.engine.start(requests)
        split.exchanges.clear()
    for own in alone:
        own.send(("start", requests))
    for own in alone:
        own.recv()
    for index in range(sizes.num_rounds + 1):
        sides: list[Callable[[], Any]] = [
            lambda: timed_steps(split.engine, sizes.num_steps) if split else [],
            lambda: _together(alone, sizes.num_steps),
        ]
        order = (0, 1) if index % 2 == 0 else (1, 0)
        seconds = {place: sides[place]() for place in order}
        yield Block(seconds[0], seconds[1])
    if split is not None:
        split.engine.stop()
    for own in alone:
        own.send(("stop", None))
        own.recv()


def timed_steps(engine: "StepEngine", num_steps: int) -> list[float]:
    """Seconds of each of so many steps, after one that is not counted."""
    engine.step()
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def _together(alone: Sequence[Connection], num_steps: int) -> list[list[float]]:
    for own in alone:
        own.send(("steps", num_steps))
    return [own.recv() for own in alone]


@contextmanager
def _split(fusion: FusionConfig) -> Iterator[Split]:
    from benchmarks.engines import fused_engine
    from tests.server.engine.forked_ranks import forked_ranks

    engine = fusion.engine.model_copy(update={"placement": "split"})
    with forked_ranks():
        split = fused_engine(fusion.model_copy(update={"engine": engine}), executor="mp")
    split.llm.collective_rpc(_stay_on_one_core)
    try:
        yield Split(split)
    finally:
        split.llm.shutdown()


def _stay_on_one_core(worker: Any) -> None:
    """A rank's thread that computes."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[worker.rank]})


@contextmanager
def _alone(fusion: FusionConfig, info: FusedModelInfo, core: int) -> Iterator[Connection]:
    """Plain vLLM with one specialist in a process of its own on one core; it answers when it has started."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_alone, args=(theirs, fusion, info, core), daemon=True)
    process.start()
    theirs.close()  # or one that dies would be waited for
    ours.recv()
    try:
        yield ours
    finally:
        ours.send(("end", None))
        process.join(30)
        process.kill()


def _serve_alone(commands: Connection, fusion: FusionConfig, info: FusedModelInfo, core: int) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(sorted(os.sched_getaffinity(0))[0])
    torch.set_num_threads(1)
    from benchmarks.engines import plain_engine

    engine = plain_engine(fusion, info, core)
    commands.send("started")
    while (command := commands.recv())[0] != "end":
        name, argument = command
        if name == "start":
            engine.start([Request(request.prompts[core : core + 1], request.num_tokens) for request in argument])
        elif name == "stop":
            engine.stop()
        commands.send(timed_steps(engine, argument) if name == "steps" else None)


def link_bandwidth(num_bytes: int = 2**25) -> float:
    """Bytes a second of large tensors between two processes, as ranks send them; the median of several."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    port = free_port()
    ranks = [context.Process(target=_send_or_receive, args=(rank, port, num_bytes, theirs)) for rank in range(2)]
    for process in ranks:
        process.start()
    theirs.close()
    seconds: list[float] = ours.recv()
    for process in ranks:
        process.join()
    return num_bytes / statistics.median(seconds[1:])


def _send_or_receive(rank: int, port: int, num_bytes: int, results: Connection) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tensor, seconds = torch.ones(num_bytes, dtype=torch.uint8), []
    for _ in range(9):
        torch.distributed.barrier()
        start = time.perf_counter()
        if rank:
            torch.distributed.send(tensor, 0)
        else:
            torch.distributed.recv(tensor, 1)
            seconds.append(time.perf_counter() - start)
    if not rank:
        results.send(seconds)
    torch.distributed.destroy_process_group()


def _bytes_of_a_logit(fusion: FusionConfig) -> int:
    """Of the type in which the second specialist computes."""
    from ultrafuser.gating.model.loading import empty_model
    from ultrafuser.server.engine.shared.dtype import dtypes_of

    named = dtypes_of(fusion)[1]
    dtype = empty_model(fusion.specialists[1]).dtype if named == "auto" else getattr(torch, named)
    return int(dtype.itemsize)


def _compare(batch: int, blocks: Sequence[Block]) -> Comparison:
    split = [statistics.median(block.split) for block in blocks if block.split]
    slower = [max(block.alone, key=statistics.median) for block in blocks if block.alone]
    comparison = Comparison(
        case=f"batch {batch}",
        unit="ms per step",
        fused=in_milliseconds([seconds for block in blocks for seconds in block.split]),
        baseline=in_milliseconds([seconds for own in slower for seconds in own]),
        ratio=paired_ratio(split, [statistics.median(own) for own in slower]) if split and slower else None,
        bar=BAR,
    )
    say(f"{comparison.case}: ratio {comparison.ratio}")
    return comparison


def _exchange(batch: int, seconds: Sequence[float], floor: float) -> Comparison:
    taken = Measured.of(seconds, scale=1000)
    case = f"exchange of logits, batch {batch}, against its bytes over the link"
    floor_ms = Measured(value=1000 * floor)
    say(f"{case}: {taken.value:.3f} against {floor_ms.value:.3f} ms")
    return Comparison(case=case, unit="ms", fused=taken, baseline=floor_ms, ratio=taken.value / floor_ms.value)


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
