"""Parts of a benchmark in processes of their own: a GPU's memory is free again only when a process ends."""

from collections.abc import Callable, Generator, Iterable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_END = None
_SECONDS_TO_END = 20
"""For what a process does once everything is said: an engine that is torn down may hang."""


def in_a_process_of_its_own(part: Callable[P, Iterable[T]], *args: P.args, **kwargs: P.kwargs) -> Generator[T]:
    """What a function of a module gives, each as soon as it is there, run in a fresh process.

    Raises:
        RuntimeError: the process ended before its time; what it said of it, an error's traceback too, is on stderr.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, part, args, kwargs))
    process.start()
    theirs.close()  # else its end would not be seen
    try:
        while (found := ours.recv()) is not _END:
            yield found[0]
        process.join(_SECONDS_TO_END)
    except EOFError:
        process.join()
        raise RuntimeError(f"{part.__name__}: its process ended with exit status {process.exitcode}") from None
    finally:
        process.kill()  # also where nobody wants the rest
        process.join()


def _send(theirs: Connection, part: Callable[..., Iterable[Any]], args: Any, kwargs: Any) -> None:
    for item in part(*args, **kwargs):
        theirs.send((item,))
    theirs.send(_END)
