"""The training loop: Transformers' Trainer, with what fusing needs changed and nothing else.

Changed: balanced batches; checkpoints that hold only what learns, written whole or not at all, with their provenance;
evaluation by domain with the gate's mean weights; the best model kept, and a stop when it has not become better for
long; a stop before the optimizer moves on a loss that is not finite, or if a part that is to learn has no gradient.
Knows learners and rows of any kind; does not know fusions or files of data.
"""

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from ultrafuser.gating.commands.provenance import PROVENANCE_FILE
from ultrafuser.gating.errors import NonFiniteLossError, TrainError
from ultrafuser.gating.files import note_contents, put_in_place, read_json, write_json
from ultrafuser.gating.training.checkpoints import CHECKPOINT_PREFIX, CONTENTS_FILE, TRAINED_FILE, all_checkpoints
from ultrafuser.gating.training.learner import FusedLearner, Learner, trainable_parameters
from ultrafuser.gating.training.sampler import BalancedBatches
from ultrafuser.gating.training.sharding import average_gradients, configure_sharding, drop_gathered, fill, whole

_STAGING = ".partial"
_SAME_LOSS = 1e-3  # relative: on a CPU it is the same number; other processes or kernels may sum in another order

Collate = Callable[[Sequence[Any]], dict[str, Any]]


class FusedTrainer(Trainer):
    """Trains a `Learner` on balanced batches.

    Args:
        learner: what learns; its parameters that require a gradient are the checkpoint.
        arguments: Transformers' own settings of the loop.
        rows: the training rows, by number.
        batches: which rows each micro-batch holds.
        collate: rows to a batch.
        eval_rows: rows to evaluate on, by domain; may be empty.
        name_marks: names of the learner's marks in the log, by domain.
        gate_learning_rate: the gate's own, or None for the same.
        patience: evaluations without a lower `eval_loss` after which training ends, or None.
        provenance: goes into every checkpoint.
        callbacks: told what happens, beside Transformers' own.
    """

    def __init__(
        self,
        learner: Learner,
        arguments: TrainingArguments,
        *,
        rows: Dataset[Any],
        batches: BalancedBatches,
        collate: Collate,
        eval_rows: Mapping[str, Dataset[Any]],
        name_marks: Callable[[str], Sequence[str]],
        gate_learning_rate: float | None,
        patience: int | None,
        provenance: Mapping[str, Any],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.learner = learner
        self._rows = rows
        self._batches = batches
        self._eval_rows = dict(eval_rows)
        self._name_marks = name_marks
        self._gate_learning_rate = gate_learning_rate
        self._patience = patience
        self._provenance = dict(provenance)
        self._step_loss: Tensor | None = None
        self._evaluation: tuple[int, dict[str, float]] | None = None
        super().__init__(
            learner,
            arguments,
            data_collator=collate,
            train_dataset=rows,
            eval_dataset=dict(eval_rows) or None,
            callbacks=list(callbacks),
        )

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's, and what sharding needs, if accelerate's configuration asks for it."""
        super().create_accelerator_and_postprocess()
        configure_sharding(self.accelerator)
        self.is_fsdp_enabled = self.accelerator.is_fsdp2
        if self.is_fsdp_enabled and isinstance(self.learner, FusedLearner):
            # Every forward pass gathers parameters from all processes: they must make the same number of them.
            self.learner.reads_rows_alone = False

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Not prepared by accelerate: the sampler already knows this process's share."""
        return DataLoader(self._rows, batch_sampler=self._batches, collate_fn=self.data_collator)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds how often each domain has been seen; Transformers' own `epoch` is the share of the run."""
        if "loss" in logs:
            seen = self._batches.epochs(self.state.global_step)
            logs |= {f"epochs_{domain}": round(count, 4) for domain, count in seen.items()}
        super().log(logs, start_time)

    # Optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW in two groups, specialists and gate, so that the gate may learn faster."""
        if self.optimizer is None:
            parameters = trainable_parameters(self.learner)
            gate = [tensor for name, tensor in parameters.items() if name.startswith("fusion_gate.")]
            others = [tensor for name, tensor in parameters.items() if not name.startswith("fusion_gate.")]
            rate = self.args.learning_rate
            groups = [{"params": others, "lr": rate}, {"params": gate, "lr": self._gate_learning_rate or rate}]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]], lr=rate, weight_decay=self.args.weight_decay
            )
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; keeps the sum of the step's losses until the optimizer is asked to move."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if self.is_fsdp_enabled and self.accelerator.sync_gradients and self.learner.fusion_gate is not None:
            average_gradients(self.learner.fusion_gate.parameters())
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last call before the optimizer moves, by all processes: where a run that has gone wrong ends."""
        self._check_gradients()
        norm = whole(torch.as_tensor(super()._get_grad_norm(model, grad_norm)))
        assert self._step_loss is not None
        # One process's loss may be wrong while its neighbour's is right; summed, all processes see the same.
        seen = self.accelerator.reduce(self._step_loss.detach().float(), reduction="sum")
        self._step_loss = None
        if not bool(torch.isfinite(seen)) or not bool(torch.isfinite(norm)):
            raise NonFiniteLossError(
                f"step {self.state.global_step + 1}: the loss is {float(seen)} and its gradient's norm {float(norm)};"
                " nothing was changed by this step. Lower --learning-rate, or look at the rows of this step"
            )
        return norm

    def _check_gradients(self) -> None:
        """Every part that is to learn has a gradient; a zero is one, as of rows that a part has no say in."""
        parts: dict[str, bool] = {}
        for name, parameter in trainable_parameters(self.learner).items():
            part = ".".join(name.split(".")[: 2 if name.startswith("specialists.") else 1])
            parts[part] = parts.get(part, False) or parameter.grad is not None
        for part, has_gradient in parts.items():
            if not has_gradient:
                raise TrainError(
                    f"step {self.state.global_step + 1}: {part} is to learn and gets no gradient; nothing was changed"
                    " by this step. Please report it with this run's config.yaml"
                )

    # Checkpoints

    def trained_state(self) -> dict[str, Tensor]:
        """What learns, by name, on the CPU; all processes must call it, the first one gets it."""
        state = {}
        for name, parameter in trainable_parameters(self.learner).items():
            tensor = whole(parameter.detach())
            if self.args.should_save:
                state[name] = tensor.cpu().contiguous()
        return state

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what learns, and where it comes from; in whole tensors, however they were sharded."""
        folder = Path(output_dir or str(self.args.output_dir))
        state = self.trained_state()
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / TRAINED_FILE, metadata={"format": "pt"})
            write_json(folder / PROVENANCE_FILE, {**self._provenance, "step": self.state.global_step})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled == (Path(resume_from_checkpoint) / "optimizer.pt").is_file():
            raise TrainError(
                f"{resume_from_checkpoint}: was written {'without' if self.is_fsdp_enabled else 'with'} sharding, which"
                " its optimizer's state cannot change; resume it with the same accelerate configuration"
            )
        before = read_json(Path(resume_from_checkpoint) / PROVENANCE_FILE, "name another --output")
        own = self._provenance.get("draft_vocabulary")
        # A checkpoint from before it was noted has none.
        if before.get("draft_vocabulary", own) != own:
            raise TrainError(
                f"{resume_from_checkpoint}: its draft head guesses other tokens than those that are most frequent in"
                " the responses now; start in a new --output"
            )
        self._fill_from(Path(resume_from_checkpoint))

    def _fill_from(self, checkpoint: Path) -> None:
        saved = load_file(checkpoint / TRAINED_FILE)
        wanted = trainable_parameters(self.learner)
        if saved.keys() != wanted.keys():
            odd = sorted(saved.keys() ^ wanted.keys())[0]
            raise TrainError(f"{checkpoint}: does not hold what learns here ({odd}); start in a new --output")
        for name, parameter in wanted.items():
            fill(parameter, saved[name])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """With sharded parameters the Trainer would save the frozen ones here too."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), _STAGING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written beside its place and renamed: a checkpoint that has its name is whole."""
        folder = Path(str(self.args.output_dir))
        if self.args.should_save:
            shutil.rmtree(folder / _STAGING, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.state.best_model_checkpoint = None  # a place that is no more; its step says where it is
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"{CHECKPOINT_PREFIX}{self.state.global_step}"
            self.state.save_to_json(str(folder / _STAGING / name / TRAINER_STATE_NAME))
            note_contents(folder / _STAGING / name, folder / _STAGING / name / CONTENTS_FILE)
            put_in_place(folder / _STAGING / name, folder / name)
            shutil.rmtree(folder / _STAGING)
            self._rotate(folder)
        self.accelerator.wait_for_everyone()

    def _rotate(self, folder: Path) -> None:
        """The newest ones stay, as many as asked for, and beside them the best one."""
        number, best = int(self.args.save_total_limit or 0), self._best_checkpoint
        is_older = best is not None and best not in all_checkpoints(folder)[:number]
        rotate_checkpoints(str(folder), number + is_older, None if best is None else str(best))

    # The best model

    @property
    def _best_checkpoint(self) -> Path | None:
        """None without early stopping, and before the first evaluation of a finite loss."""
        step = self.state.best_global_step
        return None if step is None else Path(str(self.args.output_dir)) / f"{CHECKPOINT_PREFIX}{step}"

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """After every evaluation of a step: the best model is saved at once, and so is the one that training ends with.

        Transformers' own early stopping counts in a callback, which a resumed run begins anew.
        """
        is_best = math.isfinite(metrics["eval_loss"]) and super()._determine_best_metric(metrics, trial)
        if self._has_lost_patience():
            self.control.should_training_stop = True
        self.control.should_save |= is_best or self.control.should_training_stop
        return is_best

    def _has_lost_patience(self) -> bool:
        """By the log and the best step, both of which are in a checkpoint."""
        best = self.state.best_global_step or 0
        since = {entry["step"] for entry in self.state.log_history if "eval_loss" in entry and entry["step"] > best}
        return self._patience is not None and len(since) >= self._patience

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *rest: Any
    ) -> tuple[int, int]:
        """As the Trainer's; a resumed run that had ended early makes no further step."""
        begun = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *rest)
        return (num_train_epochs, 0) if self._has_lost_patience() else begun

    def load_best(self) -> int | None:
        """Make the best checkpoint the model, and see that it still has its loss; returns its step, if there is one.

        Raises:
            TrainError: it evaluates to something else than it did.
        """
        best, state = self._best_checkpoint, self.state
        if best is None or state.best_global_step == state.global_step:
            return state.best_global_step
        self._fill_from(best)
        metrics = self._measure()
        if not math.isclose(metrics["eval_loss"], float(state.best_metric or 0), rel_tol=_SAME_LOSS):
            raise TrainError(
                f"{best}: the best checkpoint's eval_loss is {metrics['eval_loss']:.6f} now and was"
                f" {state.best_metric:.6f} when it was saved; it is not made the result. Start in a new --output"
            )
        self._evaluation = (state.global_step, metrics)
        self.control = self.callback_handler.on_evaluate(self.args, state, self.control, metrics)
        return state.best_global_step

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss in nats per response token and mean marks, of every domain; `eval_loss` is the mean of losses.

        Weighted by tokens, whatever the batches: Transformers' own loop means over batches.
        """
        metrics = self._measure(metric_key_prefix)
        self._evaluation = (self.state.global_step, dict(metrics))
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics: dict[str, float] = {}
        losses = []
        own = [self._shares(rows) for rows in self._eval_rows.values()]
        self.callback_handler.eval_dataloader = range(sum(len(shares) for shares in own))  # the progress bar's length
        for (domain, rows), shares in zip(self._eval_rows.items(), own, strict=True):
            names = self._name_marks(domain)
            loss, marks_X = self._evaluate_domain(rows, shares, len(names))
            losses.append(loss)
            metrics[f"{metric_key_prefix}_loss_{domain}"] = loss
            metrics |= {f"{metric_key_prefix}_{name}": mark for name, mark in zip(names, marks_X, strict=True)}
        metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        return metrics

    def final_evaluation(self) -> dict[str, float]:
        """Metrics of the model as it is now; empty without evaluation rows."""
        if not self._eval_rows:
            return {}
        step, metrics = self._evaluation or (None, {})
        return metrics if step == self.state.global_step else self.evaluate()

    @torch.no_grad()
    def _evaluate_domain(
        self, rows: Dataset[Any], shares: list[list[int]], num_marks: int
    ) -> tuple[float, list[float]]:
        """Sums over this process's share of the rows, then over all processes."""
        model = self.model
        assert model is not None
        model.eval()
        # Of the loss, then of each mark: its sum, and how many it is the sum of.
        sums = torch.zeros(2, 1 + num_marks, dtype=torch.float64, device=self.args.device)
        loader = DataLoader(rows, batch_sampler=[share or [0] for share in shares], collate_fn=self.data_collator)
        for share, batch in zip(shares, loader, strict=True):
            batch = self._prepare_inputs(batch)
            outputs = model(**batch)
            if not share:
                continue
            is_counted_XN = outputs["is_counted_XN"]
            sums[0, 0] += outputs["tokens_N"].double().sum()
            sums[1, 0] += len(outputs["tokens_N"])
            sums[0, 1:] += outputs["marks_XN"].double().where(is_counted_XN, 0).sum(dim=1)
            sums[1, 1:] += is_counted_XN.sum(dim=1)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        drop_gathered(model)
        totals, counts = self.accelerator.reduce(sums, reduction="sum")
        # Rows without a token that a draft head could guess have nothing to mean over.
        loss, *marks = (totals / counts.clamp(min=1)).tolist()
        return loss, marks

    def _shares(self, rows: Any) -> list[list[int]]:
        """This process's rows in batches, as many as the first process has; the last may be empty."""
        num_rows = len(rows)
        own = range(self.args.process_index, num_rows, self.args.world_size)
        size = self.args.per_device_eval_batch_size
        most = len(range(0, num_rows, self.args.world_size))
        return [list(own[begin : begin + size]) for begin in range(0, most, size)]
