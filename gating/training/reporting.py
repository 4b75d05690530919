"""What a run tells while it learns: to trackers of experiments, which may fail, and to the one who waits.

Knows Transformers' table of trackers and its callbacks; does not know what is trained.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partialmethod
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
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


class EvaluationReport(TrainerCallback):
    """A line on stderr after every evaluation: each domain's loss, their mean, and how long the rest will take."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here on time is taken; steps of a run before it was resumed have taken none of it."""
        self._began = (time.monotonic(), state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What is evaluated from now on is the result, and not of a step."""
        self._began = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Called by the trainer after every evaluation."""
        if metrics and self._began is not None and state.is_world_process_zero:
            tqdm.write(self._line(metrics, state, *self._began), file=sys.stderr)

    @staticmethod
    def _line(metrics: Mapping[str, float], state: TrainerState, begin: float, begin_step: int) -> str:
        prefix = "eval_loss_"
        losses = [f"{key.removeprefix(prefix)} {loss:.4f}" for key, loss in metrics.items() if key.startswith(prefix)]
        step = f"step {state.global_step:,} of {state.max_steps:,}"
        line = f"{step}: loss {', '.join(losses)}; mean {metrics['eval_loss']:.4f}"
        num_made, num_left = state.global_step - begin_step, state.max_steps - state.global_step
        if not (num_made and num_left):
            return line
        seconds = (time.monotonic() - begin) / num_made * num_left
        return f"{line}; about {timedelta(seconds=round(seconds))} left"


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
