"""What training runs logged, read from their folders.

Knows what `ultrafuser train` writes (`gating/training/trainer.py`); needs no model and draws nothing.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrafuser.gating.commands.run_folder import MANIFEST_FILE, RUN_FOLDER
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.files import read_json, split_name

_LOSS, _GATE = "eval_loss_", "eval_gate_"


@dataclass
class Series:
    """One number over a run."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)


@dataclass(frozen=True)
class RunCurves:
    """What one run logged."""

    label: str
    """Runs with the same label are drawn alike."""

    loss: Series
    """Training loss, nats per response token."""

    eval_loss: Series
    """Mean of the domains' losses."""

    domains: Mapping[str, Series]
    """Loss on the evaluation data, by domain."""

    gate: Mapping[str, Mapping[str, Series]]
    """Mean weight on the evaluation data, by domain and specialist."""


def read_runs(arguments: Sequence[str]) -> list[RunCurves]:
    """Curves of runs; one that is not done gives what it has saved.

    Args:
        arguments: output folders of `ultrafuser train`: FOLDER, or LABEL=FOLDER.

    Raises:
        CommandError: a folder without a run, or with one that has logged no loss.
    """
    pairs = [split_name(argument) for argument in arguments]
    names = Counter(folder.resolve().name for _, folder in pairs)
    runs = []
    for label, folder in pairs:
        name = folder.resolve().name
        # Runs are often told apart by an outer folder: then the whole path is the label.
        try:
            run = _curves(label or (name if names[name] == 1 else str(folder)), _history(folder))
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, CommandError):
                raise
            raise CommandError(
                f"--run: the log in {folder} cannot be read ({error!s:.200}); name another folder"
            ) from error
        if not run.loss.steps and not run.eval_loss.steps:
            raise CommandError(f"--run: {folder} has logged no loss; look at it again after its first checkpoint")
        runs.append(run)
    return runs


def _history(folder: Path) -> list[dict[str, Any]]:
    """The log of the whole run, or up to the newest checkpoint of one that is not done."""
    manifest = folder / MANIFEST_FILE
    states = folder.glob(f"{RUN_FOLDER}/checkpoint-*/trainer_state.json")
    newest_first = sorted(states, key=lambda path: int(path.parent.name.rpartition("-")[2]), reverse=True)
    damages = []
    for path, key in ((manifest, "history"), *((path, "log_history") for path in newest_first)):
        if path.is_file():
            try:
                history = read_json(path, "its log is taken from before").get(key)
            except CommandError as error:
                damages.append(str(error))
                continue
            if isinstance(history, list):
                print("".join(f"{damage}\n" for damage in damages), end="", file=sys.stderr, flush=True)
                return history
    if damages:
        raise CommandError(f"--run: {damages[0].rpartition('; ')[0]}; name another folder")
    raise CommandError(f"--run: {folder} has no run of `ultrafuser train`; name its --output folder")


def _curves(label: str, history: Sequence[Mapping[str, Any]]) -> RunCurves:
    loss, eval_loss = Series(), Series()
    domains: defaultdict[str, Series] = defaultdict(Series)
    gate: defaultdict[str, defaultdict[str, Series]] = defaultdict(lambda: defaultdict(Series))
    for entry in history:
        step = int(entry.get("step", 0))
        if "loss" in entry:
            loss.add(step, float(entry["loss"]))
        if "eval_loss" in entry:
            eval_loss.add(step, float(entry["eval_loss"]))
        own = [key.removeprefix(_LOSS) for key in entry if key.startswith(_LOSS)]
        for domain in own:
            domains[domain].add(step, float(entry[_LOSS + domain]))
        for key, value in entry.items():
            # The longest name: `math` must not take the numbers of `math_easy`.
            domain = max((name for name in own if key.startswith(f"{_GATE}{name}_")), key=len, default="")
            if domain:
                gate[domain][key.removeprefix(f"{_GATE}{domain}_")].add(step, float(value))
    return RunCurves(label, loss, eval_loss, domains, gate)
