"""A progress bar on stderr for what takes a while before the main work; knows nothing of the work."""

import sys

from tqdm import tqdm


class StepProgress:
    """What is being done and the share of it, as a `gating.model.cache.Report`; without a terminal, a line a step."""

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
