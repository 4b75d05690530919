"""What the trainer trains: the fused model (or its gate over cached hidden states) as one module that gives a loss.

Both learners end in the same two lines: weights from the gate, then the memory-lean loss. They know tensors; batches
come from `gating/data/batches.py`, and which parameters learn is decided by whoever built them.

Shape suffixes: S specialists, B rows, T positions (left-padded), N response tokens of a batch (row after row),
D hidden size, V shared vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.mixture import PAPERS_MIXTURE
from ultrafuser.gating.model.responses import response_states, response_turns
from ultrafuser.gating.training.keeping import FusionBefore
from ultrafuser.gating.training.losses import DEFAULT_CHUNK_SIZE, fused_loss


class Learner(nn.Module):
    """A gate, n output layers, and a way to the hidden states that subclasses give."""

    # Asks the Trainer for the number of labels in the whole step: over accumulation and over all processes.
    accepts_loss_kwargs = True

    def __init__(self, gate: Gate | None, num_shared_ids: int, chunk_size: int = DEFAULT_CHUNK_SIZE) -> None:
        super().__init__()
        self.fusion_gate = gate
        self.num_shared_ids = num_shared_ids
        self.chunk_size = chunk_size
        self.before: FusionBefore | None = None

    def forward(
        self, *, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **batch: Any
    ) -> dict[str, Tensor]:
        """The loss of a batch, and what it is made of.

        Args:
            labels: [N] response tokens of the batch, row after row.
            num_items_in_batch: response tokens of the whole step that the batch belongs to; default: the batch's.
            batch: what `hidden_states` and `responses` take.

        Returns:
            `loss`: the sum over the batch's tokens divided by the step's tokens; `tokens_N`: each token's loss;
            `marks_XN`: what else an evaluation means over tokens, here the gate's weights and, where a newcomer is held
            against the fusion `before` it, those marks, and `is_counted_XN`: over which, here all; all but the first
            detached.
        """
        hidden_states = self.hidden_states(**batch)
        responses_N = self.responses(**batch)
        mixture = PAPERS_MIXTURE
        if self.fusion_gate is None:
            weights_SN = torch.ones(1, len(labels), device=labels.device)
        else:
            weights_SN = self.fusion_gate(hidden_states, responses_N)
            mixture = self.fusion_gate.mixture
        layers = self.output_layers()
        loss = fused_loss(hidden_states, layers, weights_SN, labels, self.num_shared_ids, self.chunk_size, mixture)
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        marks_XN = weights_SN.detach()
        if self.before is not None and not self.training:
            assert self.fusion_gate is not None
            more_XN = self.before.marks(hidden_states, layers, self.fusion_gate, marks_XN, labels, responses_N)
            marks_XN = torch.cat([marks_XN, more_XN])
        return {
            "loss": loss.total / count,
            "tokens_N": loss.tokens_N,
            "marks_XN": marks_XN,
            "is_counted_XN": torch.ones_like(marks_XN, dtype=torch.bool),
        }

    def hidden_states(self, **batch: Any) -> list[Tensor]:
        """S tensors [N, D_s] that predict the labels."""
        raise NotImplementedError

    def responses(self, **batch: Any) -> Tensor:
        """Of which response each label [N] is; a row has as many as it has turns."""
        raise NotImplementedError

    def output_layers(self) -> list[nn.Module]:
        """S modules that make logits of hidden states."""
        raise NotImplementedError


class FusedLearner(Learner):
    """The whole fused model. Specialists without a trainable parameter run without a graph, in eval mode.

    With `reads_rows_alone` a specialist's forward pass has one row and no padding: the same result, quicker on a CPU.
    """

    def __init__(
        self,
        specialists: Sequence[nn.Module],
        gate: Gate | None,
        num_shared_ids: int,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ) -> None:
        super().__init__(gate, num_shared_ids, chunk_size)
        self.specialists: Any = nn.ModuleList(specialists)
        self.reads_rows_alone = False

    def train(self, mode: bool = True) -> "FusedLearner":
        """As of any module, but what is frozen stays in eval mode: its dropout would teach the gate noise."""
        super().train(mode)
        for specialist in self.specialists:
            specialist.train(mode and bool(trainable_parameters(specialist)))
        return self

    def hidden_states(self, **batch: Any) -> list[Tensor]:
        """Each specialist read at its own response positions.

        `input_ids`, `attention_mask`, `response_mask` are lists of S tensors [B, T_s].
        """
        inputs = zip(self.specialists, batch["input_ids"], batch["attention_mask"], batch["response_mask"], strict=True)
        read = _states_row_by_row if self.reads_rows_alone else response_states
        return [read(specialist, *tensors) for specialist, *tensors in inputs]

    def responses(self, **batch: Any) -> Tensor:
        """By the first of `response_mask`."""
        return response_turns(batch["response_mask"][0])

    def output_layers(self) -> list[nn.Module]:
        return [specialist.get_output_embeddings() for specialist in self.specialists]

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the decoder layers, where Transformers' models have them too: the units of sharding."""
        named = {name for model in self.specialists for name in model._no_split_modules or ()}
        return sorted(named & {type(module).__name__ for module in self.specialists.modules()})


class CachedLearner(Learner):
    """The gate over hidden states that were computed before; only the output layers of the specialists are here."""

    def __init__(
        self,
        output_weights: Sequence[Tensor],
        gate: Gate,
        num_shared_ids: int,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ) -> None:
        """`output_weights`: S matrices [V, D_s]; they do not learn."""
        super().__init__(gate, num_shared_ids, chunk_size)
        self._layers = nn.ModuleList(_frozen_linear(weight_VD) for weight_VD in output_weights)

    def hidden_states(self, **batch: Any) -> list[Tensor]:
        """Those of the batch: `hidden_states`, S tensors [N, D_s]."""
        return list(batch["hidden_states"])

    def responses(self, **batch: Any) -> Tensor:
        """Those of the batch: `responses` [N]."""
        responses_N: Tensor = batch["responses"]
        return responses_N

    def output_layers(self) -> list[nn.Module]:
        return list(self._layers)


def _states_row_by_row(specialist: Any, *tensors: Tensor) -> Tensor:
    """As `response_states`, of the same tensors [B, T], one row at a time and without its padding."""
    lengths = tensors[1].sum(dim=1).tolist()
    rows = zip(lengths, *tensors, strict=True)
    return torch.cat([response_states(specialist, *(own_T[None, -length:] for own_T in row)) for length, *row in rows])


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name: what a checkpoint has to hold."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _frozen_linear(weight_VD: Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=False)
    layer.weight = nn.Parameter(weight_VD, requires_grad=False)
    return layer
