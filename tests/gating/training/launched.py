"""What each of several launched processes runs in the tests: training runs one after the other, watched.

    accelerate launch ... -m tests.gating.training.launched JOBS.json

JOBS.json is a list of {"argv": [...], "stop_at": step or null, "poison": [process, step] or null}: a run's command
line; the step at which Ctrl-C comes; where and when the loss is not a number. Every process writes beside the run's
output, as OUTPUT.PROCESS.json, what it holds of each parameter when a checkpoint is saved, the most rows it computed at
a time, and how the run ended.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from torch.distributed.tensor import DTensor

from ultrafuser.gating.data import hidden_states
from ultrafuser.gating.errors import NonFiniteLossError
from ultrafuser.gating.training.command import train
from ultrafuser.gating.training.learner import FusedLearner, Learner
from ultrafuser.gating.training.settings import parse_settings
from ultrafuser.gating.training.trainer import FusedTrainer


def main(jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        settings = parse_settings(job["argv"])
        seen: dict[str, Any] = {"ending": "done", "most_rows": {}}
        with pytest.MonkeyPatch.context() as patch:
            _watch(patch, seen, job.get("stop_at"), job.get("poison"))
            try:
                train(settings)
            except (KeyboardInterrupt, NonFiniteLossError) as ending:
                seen["ending"] = f"{type(ending).__name__}: {ending}"
        Path(f"{settings.output}.{PartialState().process_index}.json").write_text(json.dumps(seen))


def _watch(patch: pytest.MonkeyPatch, seen: dict[str, Any], stop_at: int | None, poison: list[int] | None) -> None:
    save, step = FusedTrainer._save_checkpoint, FusedTrainer.training_step

    def saving(self: FusedTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        assert self.optimizer is not None
        moments = [state["exp_avg"] for state in self.optimizer.state.values()]
        seen["parameters"] = {name: _held(tensor) for name, tensor in self.learner.named_parameters()}
        seen["moments"] = [_held(tensor) for tensor in moments]

    def stepping(self: FusedTrainer, model: Learner, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        now = self.state.global_step + 1
        # In the last micro-batch: accelerate's "gradients are complete" outlives a run, and a fresh process has it so.
        if now == stop_at and self.accelerator.sync_gradients:
            raise KeyboardInterrupt
        if poison == [self.args.process_index, now]:
            inputs = {**inputs, "num_items_in_batch": torch.tensor(float("nan"))}
            rest = ()
        return step(self, model, inputs, *rest)

    def keeping_gradients_whole(*_: Any, **__: Any) -> None:
        pytest.fail("gradients wait for the step's end in every process, whole")

    collate, forward = hidden_states.collate_rows, FusedLearner.hidden_states

    def note(purpose: str, num_rows: int) -> None:
        seen["most_rows"][purpose] = max(seen["most_rows"].get(purpose, 0), num_rows)

    def collating(rows: Sequence[Any]) -> dict[str, Any]:
        note("cached states", len(rows))
        return collate(rows)

    def forwarding(self: FusedLearner, **batch: Any) -> list[torch.Tensor]:
        note("training" if self.training else "evaluation", len(batch["input_ids"][0]))
        return forward(self, **batch)

    patch.setattr(hidden_states, "collate_rows", collating)
    patch.setattr(FusedLearner, "hidden_states", forwarding)
    patch.setattr(Accelerator, "no_sync", keeping_gradients_whole)
    patch.setattr(FusedTrainer, "_save_checkpoint", saving)
    patch.setattr(FusedTrainer, "training_step", stepping)


def _held(tensor: torch.Tensor) -> list[int]:
    """Values that this process holds, and values of the whole."""
    return [tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel(), tensor.numel()]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
