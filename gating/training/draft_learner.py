"""What `--drafter` trains: a draft head on the fused model's own distributions over its own responses.

After EAGLE-3's training-time test: every position guesses several tokens ahead, from its second guess on by the head's
own output where it has no states yet, as in the engine. Input and label always share one prefix, the response as it
is. Knows cached hidden states and the head; knows no engine.

Shape suffixes: S specialists, B responses, T positions of a response (right-padded), N response tokens of a batch, C
positions that are attended to, M guesses that count, D hidden size, K heads of keys, G queries of a key, E size of a
head, V draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ultrafuser.gating.model.draft_head import DraftHead, DraftHeadConfig
from ultrafuser.gating.model.gate import Gate, gate_digest
from ultrafuser.gating.model.responses import IGNORED_LABEL
from ultrafuser.gating.training.inputs import RunInputs
from ultrafuser.gating.training.learner import Learner

HEAD_SIZE = 64
DISCOUNT = 0.8
"""What a guess counts, as a share of the one before it (EAGLE-3's)."""


def collate_responses(rows: Sequence[tuple[list[Tensor], Tensor]], eos_token_id: int) -> dict[str, Any]:
    """Cached rows as a batch of single responses: `hidden_states` S x [B, T, D_s] and `labels` [B, T].

    A response ends with its EOS, the last one of a row also where it was cut; the engine, too, knows nothing of the
    turns before.
    """
    responses = [part for states, labels_R in rows for part in _split(states, labels_R, eos_token_id)]
    pad = nn.utils.rnn.pad_sequence
    return {
        "hidden_states": [
            pad([states[index] for states, _ in responses], batch_first=True) for index in range(len(rows[0][0]))
        ],
        "labels": pad([labels_R for _, labels_R in responses], batch_first=True, padding_value=IGNORED_LABEL),
    }


def _split(states: Sequence[Tensor], labels_R: Tensor, eos_token_id: int) -> list[tuple[list[Tensor], Tensor]]:
    ends = (labels_R == eos_token_id).nonzero()[:, 0].add(1).tolist()
    bounds = sorted({0, *ends, len(labels_R)})
    return [([state_RD[begin:end] for state_RD in states], labels_R[begin:end]) for begin, end in pairwise(bounds)]


def draft_vocabulary(labels_N: Tensor, num_ids: int, num_shared_ids: int) -> Tensor:
    """The most frequent tokens of the responses, ascending; of equally frequent ones the first.

    A function of the data alone: a run that goes on, which is held to its data, has the same.
    """
    counts_V = torch.bincount(labels_N, minlength=num_shared_ids)
    return counts_V.sort(descending=True, stable=True).indices[:num_ids].sort().values


def draft_head_config(inputs: RunInputs, num_draft_ids: int) -> DraftHeadConfig:
    """The shape of a head for a run's fusion, and what tells that fusion from others."""
    fusion, hidden_sizes = inputs.fusion, inputs.info.hidden_sizes
    num_heads = max(1, hidden_sizes[0] // HEAD_SIZE)
    return DraftHeadConfig(
        specialists=fusion.specialist_names,
        hidden_sizes=hidden_sizes,
        vocabulary=inputs.vocabulary,
        gate=gate_digest(fusion.gate),
        num_draft_ids=num_draft_ids,
        num_heads=num_heads,
        num_kv_heads=max(own for own in (1, 2, 3, 4, 8) if num_heads % own == 0),
        head_size=HEAD_SIZE,
        intermediate_size=hidden_sizes[0],
        window=inputs.settings.draft_window,
    )


def fresh_draft_head(config: DraftHeadConfig, draft_ids_V: Tensor, output_VD: Tensor) -> DraftHead:
    """A head that begins as its feature and the leader's output rows [V, D] of the draft vocabulary; torch's seed."""
    head = DraftHead(config)
    with torch.no_grad():
        blocks = head.fuse.weight.split(config.hidden_sizes, dim=1)
        for block_DD in blocks:
            if block_DD.shape[0] == block_DD.shape[1]:
                block_DD.copy_(torch.eye(len(block_DD)))
        head.mix.weight.zero_()
        head.down.weight.zero_()
        head.output.weight.copy_(output_VD)
        head.draft_ids_V.copy_(draft_ids_V)
    return head


@dataclass(frozen=True)
class _Targets:
    """What each position is to guess: the token after its own."""

    distribution_BTV: Tensor
    """float32, over the draft vocabulary."""

    token_BT: Tensor
    """The token that was drawn, as a column of the draft vocabulary; -1 where it is none of them, or none follows."""


class DraftLearner(Learner):
    """A draft head over hidden states that were computed before; gate, embeddings and output layers are frozen.

    Its marks [X, N] of every response token are `MARKS`.
    """

    MARKS = ("accepted", "first", "outside")
    """How many guesses from this position on are right, at most `num_guesses`; whether the first one is; and whether
    the token to guess is outside the draft vocabulary."""

    def __init__(
        self, head: DraftHead, gate: Gate, embeddings_VD: Tensor, output_weights: Sequence[Tensor], num_guesses: int
    ) -> None:
        """`embeddings_VD`: the leader's; `output_weights`: S matrices of the draft vocabulary's rows [V, D_s]."""
        super().__init__(gate.requires_grad_(False), len(embeddings_VD))
        self.draft_head = head
        self._num_guesses = num_guesses
        self._embeddings = nn.Embedding.from_pretrained(embeddings_VD, freeze=True)
        self._output_weights = nn.ParameterList(nn.Parameter(own, requires_grad=False) for own in output_weights)

    def forward(
        self, *, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **batch: Any
    ) -> dict[str, Tensor]:
        """Soft cross-entropy of every guess against the fused distribution restricted to the draft vocabulary.

        A guess whose token was outside the vocabulary counts nothing, as no guess could be right.

        Args:
            labels: [B, T] response tokens, -100 beyond a response's end.
            num_items_in_batch: response tokens of the whole step; default: the batch's.
            batch: `hidden_states`, S x [B, T, D_s], each of which predicts the label at its place.

        Returns:
            `loss`: summed over guesses, discounted by how far ahead, and divided by the tokens; `tokens_N`: each
            position's loss of its first guess; `marks_XN`; both detached.
        """
        hidden_states: Sequence[Tensor] = batch["hidden_states"]
        assert self.fusion_gate is not None
        with torch.no_grad():
            weights_SBT = self.fusion_gate(hidden_states)
            targets = self._targets(hidden_states, weights_SBT, labels)
            embeddings_BTD = self._embeddings(labels.clamp(min=0))
        features_BTD = self.draft_head.features(hidden_states, weights_SBT)
        is_label_BT = labels != IGNORED_LABEL
        total = features_BTD.new_zeros((), dtype=torch.float32)
        first_BT = torch.zeros_like(labels, dtype=torch.float32)
        # Whether all guesses from a position on were right so far; each guess looks one position further.
        is_right_BT, accepted_BT = is_label_BT, torch.zeros_like(first_BT)
        chain = _Chain(self.draft_head)
        for ahead in range(min(self._num_guesses, labels.shape[1])):
            states_BTD = chain.step(embeddings_BTD, features_BTD)
            losses_BT, guessed_BT = self._compare(states_BTD, targets, ahead)
            total = total + DISCOUNT**ahead * losses_BT.sum()
            is_right_BT = is_right_BT & _later(guessed_BT, ahead)
            accepted_BT += is_right_BT
            first_BT = losses_BT.detach() if ahead == 0 else first_BT
            features_BTD = _earlier(states_BTD, 1)
        is_outside_BT = _later(is_label_BT, 1) & (targets.token_BT < 0)
        marks = torch.stack([accepted_BT, (accepted_BT > 0).float(), is_outside_BT.float()])
        count = int(is_label_BT.sum()) if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count, "tokens_N": first_BT[is_label_BT], "marks_XN": marks[:, is_label_BT]}

    def _targets(self, hidden_states: Sequence[Tensor], weights_SBT: Tensor, labels_BT: Tensor) -> _Targets:
        pairs = zip(hidden_states, self._output_weights, weights_SBT, strict=True)
        mixed = (weights_BT.unsqueeze(-1) * (own @ rows_VD.T).float() for own, rows_VD, weights_BT in pairs)
        logits_BTV = sum(mixed, start=weights_SBT.new_zeros(()))
        ids_V = self.draft_head.draft_ids_V
        columns_BT = torch.searchsorted(ids_V, labels_BT.clamp(min=0)).clamp(max=len(ids_V) - 1)
        columns_BT = columns_BT.where(ids_V[columns_BT] == labels_BT, -1)
        return _Targets(_later(logits_BTV.softmax(dim=-1), 1), _later(columns_BT, 1, fill=-1))

    def _compare(self, states_BTD: Tensor, targets: _Targets, ahead: int) -> tuple[Tensor, Tensor]:
        """The losses [B, T] of the guesses that are made at each position, and whether they are right."""
        counts_BT = targets.token_BT >= 0
        counts_BT = counts_BT & (torch.arange(counts_BT.shape[1], device=counts_BT.device) >= ahead)
        scores_MV = self.draft_head.scores(states_BTD[counts_BT]).float()
        losses_M = -(targets.distribution_BTV[counts_BT] * scores_MV.log_softmax(dim=-1)).sum(dim=-1)
        right_M = scores_MV.argmax(dim=-1) == targets.token_BT[counts_BT]
        losses_BT = torch.zeros_like(counts_BT, dtype=torch.float32).masked_scatter(counts_BT, losses_M)
        return losses_BT, torch.zeros_like(counts_BT).masked_scatter(counts_BT, right_M)


class _Chain:
    """The layer at all positions at once, one guess further at each step.

    At step s position t stands in the chain that began at position t - s: it attends to the positions up to there by
    their own features, and to its s latest, itself included, by those that the head made.
    """

    def __init__(self, head: DraftHead) -> None:
        self._head = head
        self._keys_values: list[tuple[Tensor, Tensor]] = []

    def step(self, embeddings_BTD: Tensor, features_BTD: Tensor) -> Tensor:
        """States [B, T, D] of this step; those of positions before its chain's begin are garbage."""
        inputs_BTX = self._head.inputs(embeddings_BTD, features_BTD)
        positions_T = torch.arange(inputs_BTX.shape[1], device=inputs_BTX.device)
        self._keys_values.append(self._head.keys_values(inputs_BTX, positions_T))
        attended_BTX = self._attend(self._head.queries(inputs_BTX, positions_T), positions_T)
        return self._head.states(features_BTD, attended_BTX)

    def _attend(self, queries_BTKGE: Tensor, positions_T: Tensor) -> Tensor:
        num_steps = len(self._keys_values) - 1
        (keys_BCKE, values_BCKE), *chain = self._keys_values
        chain = [
            (_earlier(keys, num_steps - index), _earlier(values, num_steps - index))
            for index, (keys, values) in enumerate(chain, start=1)
        ]
        back_TC = positions_T[:, None] - positions_T
        is_seen_TC = (back_TC >= num_steps) & (back_TC < self._head.config.window)
        scores_BTKGC = torch.einsum("btkge,bcke->btkgc", queries_BTKGE, keys_BCKE).float()
        scores_BTKGC = scores_BTKGC.masked_fill(~is_seen_TC[:, None, None], torch.finfo(torch.float32).min)
        own = [torch.einsum("btkge,btke->btkg", queries_BTKGE, keys).float().unsqueeze(-1) for keys, _ in chain]
        weights = torch.cat([scores_BTKGC, *own], dim=-1).softmax(dim=-1).to(values_BCKE.dtype)
        length = len(positions_T)
        attended_BTKGE = torch.einsum("btkgc,bcke->btkge", weights[..., :length], values_BCKE)
        for index, (_, values) in enumerate(chain):
            attended_BTKGE = attended_BTKGE + weights[..., length + index].unsqueeze(-1) * values.unsqueeze(-2)
        return attended_BTKGE.flatten(-3)


def _earlier(tensor_BTX: Tensor, steps: int) -> Tensor:
    """What stands so many positions earlier; zeros at the begin."""
    if steps == 0:
        return tensor_BTX
    return torch.cat([torch.zeros_like(tensor_BTX[:, :steps]), tensor_BTX[:, :-steps]], dim=1)


def _later(tensor_BTX: Tensor, steps: int, fill: int = 0) -> Tensor:
    """What stands so many positions later; `fill` at the end."""
    if steps == 0:
        return tensor_BTX
    return torch.cat([tensor_BTX[:, steps:], torch.full_like(tensor_BTX[:, :steps], fill)], dim=1)
