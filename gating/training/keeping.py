"""What a newcomer changes for the specialists that were there: the fusion as it was, beside the one that learns.

Knows tensors, gates and how they mix; does not know fusions, files and what learns.

Shape suffixes: S specialists with the newcomer, N response tokens, C tokens of a chunk, D hidden size, V shared
vocabulary.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.mixture import fuse


class FusionBefore:
    """The fusion of all specialists but the last, by the gate that it had; plain, so that no trainer makes it learn."""

    def __init__(self, gate: Gate, num_shared_ids: int, chunk_size: int) -> None:
        self._gate = gate.requires_grad_(False)
        self._num_shared_ids = num_shared_ids
        self._chunk_size = chunk_size

    @torch.no_grad()
    def marks(
        self,
        hidden_states: Sequence[Tensor],
        output_layers: Sequence[nn.Module],
        gate: Gate,
        weights_SN: Tensor,
        labels_N: Tensor,
        responses_N: Tensor | None = None,
    ) -> Tensor:
        """float32 [1 + S, N]: of each token, as `names_before` calls them.

        The KL divergence of the fused distribution from the one before, over the ids that all share now, the newcomer
        too; the loss before; the S - 1 weights before.

        Args:
            hidden_states: S tensors [N, D_s].
            output_layers: S modules that make logits of them.
            gate: the one that learns, whose `weights_SN` these are.
            labels_N: the tokens.
            responses_N: as of `Gate.forward`.
        """
        before = self._gate.to(weights_SN.device)
        before_SN = before(hidden_states[:-1], responses_N)
        marks = []
        for begin in range(0, len(labels_N), self._chunk_size):
            rows = slice(begin, begin + self._chunk_size)
            logits = [layer(state_ND[rows]) for layer, state_ND in zip(output_layers, hidden_states, strict=True)]
            now_CV = fuse(weights_SN[:, rows], logits, self._num_shared_ids, gate.mixture).log_softmax(dim=-1)
            then_CV = fuse(before_SN[:, rows], logits[:-1], self._num_shared_ids, before.mixture).log_softmax(dim=-1)
            distance_C = (now_CV.exp() * (now_CV - then_CV)).sum(dim=-1)
            loss_C = nn.functional.nll_loss(then_CV, labels_N[rows], reduction="none")
            marks.append(torch.cat([torch.stack([distance_C, loss_C]), before_SN[:, rows]]))
        return torch.cat(marks, dim=1) if marks else weights_SN.new_zeros(1 + len(weights_SN), 0)


def names_before(domain: str, others: Sequence[str]) -> list[str]:
    """How an evaluation calls the means of these marks on a domain."""
    return [f"distance_{domain}", f"before_loss_{domain}", *(f"before_gate_{domain}_{name}" for name in others)]


class NewcomerReport(TrainerCallback):
    """Says what the newcomer is worth and changes: before a step is made, and at the end."""

    def __init__(self, name: str, others: Sequence[str], domains: Sequence[str]) -> None:
        self._name, self._others, self._domains = name, tuple(others), tuple(domains)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Called by the trainer after every evaluation."""
        is_last = state.global_step == state.max_steps or control.should_training_stop
        if metrics and state.is_world_process_zero and (state.global_step == 0 or is_last):
            how = "before training" if state.global_step == 0 else "trained"
            print("\n".join(self.lines(metrics, how)), file=sys.stderr, flush=True)

    def lines(self, metrics: Mapping[str, float], how: str) -> list[str]:
        """The report, a line for each domain."""
        return [
            f"{self._name}, {how}, on the rows to evaluate on (nats per response token; distance: mean KL divergence"
            " from the fusion as it was):",
            *(self._line(domain, metrics) for domain in self._domains),
        ]

    def _line(self, domain: str, metrics: Mapping[str, float]) -> str:
        names = (*self._others, self._name)
        now = ", ".join(f"{name} {metrics[f'eval_gate_{domain}_{name}']:.3f}" for name in names)
        before = ", ".join(f"{name} {metrics[f'eval_before_gate_{domain}_{name}']:.3f}" for name in self._others)
        return (
            f"  {domain}: loss {metrics[f'eval_loss_{domain}']:.4f}, was {metrics[f'eval_before_loss_{domain}']:.4f};"
            f" distance {metrics[f'eval_distance_{domain}']:.4f}; mean weights {now}; were {before}"
        )
