"""Two sides in turns: the order of the steps is written down by fakes and compared with what was promised."""

from collections.abc import Sequence

from benchmarks.stepping import alternate, race
from benchmarks.workload import Request

REQUESTS = [Request([[1], [2]], 4)]


class Recorder:
    """A side that writes down what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def start(self, requests: Sequence[Request]) -> None:
        assert requests == REQUESTS
        self.log.append(f"{self.name} start")

    def step(self) -> None:
        self.log.append(self.name)

    def stop(self) -> None:
        self.log.append(f"{self.name} stop")


class Work:
    """A job of a known number of steps."""

    def __init__(self, name: str, num_steps: int, log: list[str]) -> None:
        self.name, self.log = name, log
        self.num_steps, self.num_done = num_steps, 0

    @property
    def progress(self) -> float:
        return self.num_done / self.num_steps

    def step(self) -> None:
        assert self.num_done < self.num_steps, "a finished job was stepped"
        self.num_done += 1
        self.log.append(self.name)


def test_blocks_take_turns_and_the_first_side_changes_from_round_to_round() -> None:
    log: list[str] = []
    rounds = alternate(Recorder("f", log), Recorder("b", log), REQUESTS, num_rounds=2, num_steps=2)
    assert log[:2] == ["f start", "b start"]
    assert log[2:-2] == ["f"] * 4 + ["b"] * 4 + ["b"] * 4 + ["f"] * 4
    assert log[-2:] == ["f stop", "b stop"]
    assert len(rounds) == 2


def test_the_first_steps_of_a_block_are_not_counted() -> None:
    rounds = alternate(Recorder("f", []), Recorder("b", []), REQUESTS, num_rounds=1, num_steps=5)
    assert len(rounds[0].fused) == len(rounds[0].baseline) == 5


def test_a_side_that_is_left_out_leaves_no_samples() -> None:
    rounds = alternate(None, Recorder("b", []), REQUESTS, num_rounds=3, num_steps=1)
    assert [(len(r.fused), len(r.baseline)) for r in rounds] == [(0, 1)] * 3


def test_in_a_race_the_job_that_is_behind_runs_next_and_both_are_finished() -> None:
    log: list[str] = []
    quick, slow = Work("q", 4, log), Work("s", 12, log)
    seconds = race([quick, slow], num_steps=2)
    assert quick.progress == slow.progress == 1
    assert len(seconds) == 2
    # After q's first block (half done) s catches up before q goes on.
    assert log == ["q"] * 2 + ["s"] * 6 + ["q"] * 2 + ["s"] * 6
    assert all(value > 0 for value in seconds)
