"""The start as the user sees it: numbered steps on stderr, each with its time, until the server is ready."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_TICK_SECONDS = 1.0


class StartupProgress:
    """Prints one line per step; on a terminal the line of the step under way shows the seconds it has taken."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._num_steps = num_steps
        self._index = 0
        self._detail = ""
        self._lock = threading.Lock()

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One step; it is reported as done only if nothing was raised."""
        self._index += 1
        self._detail = ""
        line = f"[{self._index}/{self._num_steps}] {title}"
        start = time.monotonic()
        done = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(line, start, done), daemon=True)
        if self._stream.isatty():
            ticker.start()
        else:
            self._write(f"{line} ...\n")
        try:
            yield
        finally:
            done.set()
            if ticker.is_alive():
                ticker.join()
        clear = "\r\033[K" if self._stream.isatty() else ""
        self._write(f"{clear}{line}: {time.monotonic() - start:.1f} s\n")

    def report(self, label: str, share: float) -> None:
        """Say what the step under way is doing, and which share (0 to 1) of it is done."""
        detail = f"{label} {share:.0%}"
        if not self._stream.isatty() and label != self._detail.rpartition(" ")[0]:
            self._write(f"      {label}\n")
        self._detail = detail

    def say(self, line: str) -> None:
        """A line beside the steps."""
        self._write(f"{line}\n")

    def _tick(self, line: str, start: float, done: threading.Event) -> None:
        while not done.is_set():
            detail = f", {self._detail}" if self._detail else ""
            self._write(f"\r\033[K{line}{detail} ... {time.monotonic() - start:.0f} s")
            done.wait(_TICK_SECONDS)

    def _write(self, text: str) -> None:
        with self._lock:
            self._stream.write(text)
            self._stream.flush()
