"""Parts of a benchmark in processes of their own; little is imported here, as every such process does it again."""

import os
import time
from collections.abc import Iterator

import pytest

from benchmarks.process import in_a_process_of_its_own


def numbers(*, then_dies: bool) -> Iterator[int]:
    yield from (1, 2)
    if then_dies:
        os._exit(3)


def own_id_and_nothing_more() -> Iterator[int]:
    yield os.getpid()
    time.sleep(600)


def test_a_part_gives_what_it_has_found_and_ends() -> None:
    assert list(in_a_process_of_its_own(numbers, then_dies=False)) == [1, 2]


def test_of_a_part_that_dies_there_is_what_it_had_found() -> None:
    found = in_a_process_of_its_own(numbers, then_dies=True)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(RuntimeError, match="numbers: its process ended with exit status 3"):
        next(found)


def test_a_part_that_nobody_waits_for_is_ended() -> None:
    found = in_a_process_of_its_own(own_id_and_nothing_more)
    process = next(found)
    os.kill(process, 0)
    found.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
