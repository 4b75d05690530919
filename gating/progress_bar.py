"""Progress on stderr: what is done now and the share of it, or how many of many. Knows nothing of the work."""

import sys
from typing import NoReturn

from tqdm import tqdm


class StepProgress:
    """What is being done and the share of it, as a `Report` of the cache; without a terminal, a line a step."""

    def __init__(self, *, is_shown: bool = True) -> None:
        self._label = ""
        self._is_shown = is_shown
        bar_format = "{desc} |{bar:30}| {percentage:3.0f}% {elapsed}"
        self._bar = tqdm(total=1.0, disable=None if is_shown else True, bar_format=bar_format, leave=False)

    def __call__(self, label: str, share: float) -> None:
        if not self._bar.disable:
            self._bar.set_description_str(label, refresh=False)
            self._bar.update(share - self._bar.n)
        elif self._is_shown and label != self._label:
            print(label, file=sys.stderr, flush=True)
        self._label = label

    def close(self) -> None:
        """Take the bar off the screen."""
        self._bar.close()


def counting_bar(label: str, total: int, unit: str, done: int = 0) -> "tqdm[NoReturn]":
    """A bar that counts units; without a terminal, a line when it begins."""
    if not sys.stderr.isatty():
        print(f"{label}: {total - done:,} of {total:,} {unit}s to go", file=sys.stderr, flush=True)
    return tqdm(total=total, initial=done, desc=label, unit=unit, disable=None, smoothing=0.05)
