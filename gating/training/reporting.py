"""What a run tells while it learns: to trackers of experiments, which may fail, and to the one who waits.

Knows Transformers' table of trackers and its callbacks; does not know what is trained.
"""

import sys
from collections.abc import Sequence
from functools import partialmethod
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ultrafuser.gating.errors import TrainError

NO_TRACKER = "none"


class Trackers(TrainerCallback):
    """Transformers' callbacks of trackers; one that fails is named, and left out from then on.

    A tracker has tried again itself before it fails; asked on, a server that is gone would cost minutes a step.

    Args:
        names: of Transformers' table, or "none".

    Raises:
        TrainError: a name is unknown, or its package cannot be used here.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._trackers = {name: _tracker(name) for name in names if name != NO_TRACKER}

    def _tell(self, event: str, *arguments: Any, **context: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, event)(*arguments, **context)
            except Exception as error:  # whatever a tracker's package or its server has raised
                del self._trackers[name]
                print(
                    f"warning: the tracker {name} failed ({_in_words(error)}) and gets nothing more; training goes on",
                    file=sys.stderr,
                    flush=True,
                )


for _event in (name for name in dir(TrainerCallback) if name.startswith("on_")):
    setattr(Trackers, _event, partialmethod(Trackers._tell, _event))


def _tracker(name: str) -> TrainerCallback:
    if name not in INTEGRATION_TO_CALLBACK:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise TrainError(f"--report-to: {name!r:.60} is no tracker; name some of {known}, or {NO_TRACKER}")
    try:
        return INTEGRATION_TO_CALLBACK[name]()
    except Exception as error:  # it is missing, or cannot be imported
        raise TrainError(
            f"--report-to: {name} cannot be used here ({_in_words(error)}); install it, or name another"
        ) from error


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}".rstrip(": ")
