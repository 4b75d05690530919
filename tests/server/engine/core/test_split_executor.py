"""A rank that raises, is killed or hangs ends the engine soon, and nothing is left of it."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from tests.fakes import write_tiny_fusion
from tests.server.engine.harness import Arrival, InProcessEngine, greedy, random_prompts
from ultrafuser.server.engine.worker.worker import FusedWorkerMixin

ERROR_SECONDS = 5.0
END_SECONDS = 20.0
PROMPTS = random_prompts((13, 36), seed=0)


@pytest.fixture(scope="module")
def two_specialists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    return write_tiny_fusion(folder, num_layers=(1, 1), hidden_sizes=(64, 64), vocab_sizes=(320, 328), names=("a", "b"))


class Ranks:
    """An engine of two ranks, and their processes."""

    def __init__(self, engine: InProcessEngine) -> None:
        self.engine = engine
        self.processes = [psutil.Process(pid) for pid in engine.llm.collective_rpc(lambda _: os.getpid())]
        self.executor = engine.llm.engine_core.engine_core.model_executor
        self.statuses = [own.proc for own in self.executor.workers]

    def wait_for_the_end(self, start: float) -> None:
        """All processes have ended, and it is known how."""
        while any(own.exitcode is None for own in self.statuses):
            assert time.monotonic() - start < END_SECONDS
            time.sleep(0.05)


SPLIT: dict[str, Any] = {"placement": "split"}
SHARDS: dict[str, Any] = {"tensor_parallel_size": 2, "speculation": {"max_tokens": 0}}


@pytest.fixture
def ranks(two_specialists: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """With a specialist each, or as the test's parameter says."""
    monkeypatch.setattr("vllm.envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", 1, raising=False)
    with InProcessEngine(two_specialists, **getattr(request, "param", SPLIT)) as engine:
        engine.tokens([Arrival(PROMPTS, greedy(2))])
        ranks = Ranks(engine)
        try:
            yield ranks
        finally:
            for own in ranks.processes:
                if own.is_running():
                    own.resume()


def raise_in_the_follower(ranks: Ranks) -> None:
    ranks.engine.llm.collective_rpc(break_the_follower)


def break_the_follower(worker: Any) -> None:
    """Have it fail at its twentieth step."""
    if worker.rank == 1:
        send, steps = worker.model_runner._mixer.send, iter(range(20))

        def send_or_fail(*args: Any) -> None:
            if next(steps, None) is None:
                raise RuntimeError("an injected fault")
            send(*args)

        worker.model_runner._mixer.send = send_or_fail


def kill_the_follower_of_a_leader_that_heeds_nothing(ranks: Ranks) -> None:
    """As one that waits on a GPU."""
    leader, follower = ranks.processes
    leader.suspend()
    follower.kill()


@pytest.mark.parametrize(
    ("ranks", "fault"),
    [
        (SPLIT, raise_in_the_follower),
        (SPLIT, kill_the_follower_of_a_leader_that_heeds_nothing),
        (SHARDS, kill_the_follower_of_a_leader_that_heeds_nothing),
    ],
    indirect=["ranks"],
    ids=["split-raise", "split-kill", "shards-kill"],
)
def test_the_callers_have_an_error_and_no_rank_is_left(ranks: Ranks, fault: Callable[[Ranks], None]) -> None:
    if fault is raise_in_the_follower:
        fault(ranks)
    else:
        threading.Timer(0.2, fault, [ranks]).start()
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        ranks.engine.tokens([Arrival(PROMPTS, greedy(900))])
    assert time.monotonic() - start < ERROR_SECONDS
    ranks.wait_for_the_end(start)
    assert ranks.statuses[1].exitcode


def test_a_rank_that_hangs_does_not_outlive_the_engine(ranks: Ranks) -> None:
    steps = threading.Thread(target=serve_until_the_end, args=[ranks.engine])
    steps.start()
    ranks.processes[1].suspend()
    steps.join(2)
    assert steps.is_alive(), "it waits for the rank"
    start = time.monotonic()
    ranks.engine.llm.engine_core.shutdown()
    ranks.wait_for_the_end(start)
    steps.join(5)
    assert not steps.is_alive()


class _Faulty(CPUWorker):
    """The follower fails where caches are made, or where models are warmed up, and the leader waits for it."""

    def initialize_from_config(self, *args: Any) -> None:
        """As vLLM's, up to the fault."""
        super().initialize_from_config(*args)
        self._fail_or_wait("caches")

    def compile_or_warm_up_model(self) -> Any:
        """The fault."""
        self._fail_or_wait("warm-up")
        return super().compile_or_warm_up_model()

    def _fail_or_wait(self, where: str) -> None:
        if os.environ["FAULT"] == where:
            if self.rank == 1:
                raise RuntimeError("an injected fault")
            torch.distributed.barrier()


class FaultyWorker(FusedWorkerMixin, _Faulty):
    """Ours over one that fails."""


@pytest.mark.parametrize("where", ["caches", "warm-up"])
def test_a_rank_that_fails_before_the_first_request_ends_the_start(
    two_specialists: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("ultrafuser.server.engine.shared.options.CPU_WORKER", f"{__name__}.{FaultyWorker.__name__}")
    monkeypatch.setenv("FAULT", where)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        InProcessEngine(two_specialists, placement="split")
    assert time.monotonic() - start < 60  # a start, and the end


def serve_until_the_end(engine: InProcessEngine) -> None:
    with pytest.raises(RuntimeError):
        engine.tokens([Arrival(PROMPTS, greedy(900))])
