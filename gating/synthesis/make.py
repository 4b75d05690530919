"""One run: stage after stage, each made of what the ones before left, with a report at its end.

A stage begins when the one before has ended, so what it asks does not depend on who answered first. Puts the parts
together; see docs/data.md.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from ultrafuser.gating.commands.endpoint import ENDPOINT_FIELDS, Endpoint
from ultrafuser.gating.commands.run_folder import keep_settings, sole_run
from ultrafuser.gating.data.duplicates import find_duplicates
from ultrafuser.gating.files import write_json
from ultrafuser.gating.progress_bar import counting_bar
from ultrafuser.gating.synthesis.calls.asking import Asker
from ultrafuser.gating.synthesis.calls.budget import Account
from ultrafuser.gating.synthesis.calls.runner import Runner
from ultrafuser.gating.synthesis.settings import MakeSettings
from ultrafuser.gating.synthesis.stages.store import Store
from ultrafuser.gating.synthesis.stages.structure import COMPLICATIONS, RELATED, Structure
from ultrafuser.gating.synthesis.stages.task import Task
from ultrafuser.gating.synthesis.stages.tasks import Tasks, all_instructions

REPORT_FILE = "report.json"


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    is_stopped: bool
    """Whether the budget ended it."""

    num_failed: int
    """Calls that failed and may succeed in another run."""

    report: dict[str, Any]


async def make(settings: MakeSettings, structure: Structure) -> Ending:
    """Make what is missing in the settings' folder.

    Raises:
        CommandError: a folder of another structure, or one in use; a server that is gone or refuses everybody. What
            was made is kept.
    """
    folder = Path(settings.output).expanduser()
    with sole_run(folder):
        keep_settings(folder, structure.as_json())
        with Store(folder) as store:
            chosen = settings.model_dump(include=ENDPOINT_FIELDS)
            async with Endpoint(**chosen, asks_again_when_late=True) as endpoint:
                model = settings.model or await endpoint.first_model()
                account = Account(settings.prices, settings.budget, store.tokens)
                runner = Runner(Asker(endpoint, model, settings, account), store, settings.concurrency)
                run = _Run(settings, structure, store, runner, account)
                try:
                    return await run.all_stages()
                finally:
                    write_json(folder / REPORT_FILE, run.report())


class _Run:
    def __init__(
        self, settings: MakeSettings, structure: Structure, store: Store, runner: Runner, account: Account
    ) -> None:
        self._settings = settings
        self._structure = structure
        self._store = store
        self._runner = runner
        self._account = account
        self._tasks = Tasks(structure)
        self._dropped: dict[str, str] = {}

    async def all_stages(self) -> Ending:
        is_stopped = False
        for stage in self._structure.stages:
            if stage == COMPLICATIONS:
                self._dropped = drop_duplicates(self._store, self._settings.duplicate_threshold)
            # Made twice: they are too many to be kept.
            tasks = partial(self._tasks.of, stage, self._store, self._dropped)
            are_missing = [self._is_missing(task) for task in tasks()]
            with counting_bar(stage, len(are_missing), "call", are_missing.count(False)) as bar:
                missing = filter(self._is_missing, tasks())
                is_stopped = await self._runner.make(missing, partial(self._show, bar))
            if is_stopped:
                break
        num_failed = sum(not miss.is_final for miss in self._store.misses)
        return Ending(is_stopped, num_failed, self.report())

    def report(self) -> dict[str, Any]:
        """What there is, and what is not and why, by stage."""
        prompt_tokens, completion_tokens = self._store.tokens
        return {
            "stages": {stage: stage_report(self._store, stage) for stage in self._structure.stages},
            "dropped_instructions": dict(Counter(self._dropped.values())),
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "cost": round(self._account.spent, 6),
            "settings": self._settings.model_dump(mode="json", exclude={"api_key"}),
        }

    def _is_missing(self, task: Task) -> bool:
        miss = self._store.miss(task.id)
        is_rejected = miss is not None and miss.is_final and not self._settings.retry_rejected
        return task.id not in self._store.ids(task.stage) and not is_rejected

    def _show(self, bar: "tqdm[NoReturn]") -> None:
        bar.set_postfix_str(f"cost {self._account.spent:.2f}, {len(self._store.misses)} missed", refresh=False)
        bar.update()


def drop_duplicates(store: Store, threshold: float) -> dict[str, str]:
    """Ids of instructions that say what another says; of those, related ones go first, then those of larger ids."""
    ranked = sorted((record.stage == RELATED, item.id, item.text) for record, item in all_instructions(store))
    with counting_bar("duplicates", len(ranked), "instruction") as bar:
        return find_duplicates(((identity, text) for _, identity, text in ranked), threshold, bar.update)


def stage_report(store: Store, stage: str) -> dict[str, Any]:
    """Calls with a usable answer, good items, rejected items by reason, calls without a usable answer by reason."""
    rejects = Counter(item.reject for record in store.records(stage) for item in record.items)
    good = rejects.pop("", 0)
    missed = Counter(miss.reason for miss in store.misses if miss.stage == stage)
    return {"calls": len(store.ids(stage)), "items": good, "rejected": dict(rejects), "missed": dict(missed)}
