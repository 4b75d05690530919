"""Parts of a benchmark in processes of their own: a GPU's memory is free again only when a process ends."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_a_process_of_its_own(part: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function of a module returns or raises, run in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(part, *args, **kwargs).result()
