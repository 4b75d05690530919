"""What `--drafter` trains: a draft head on the fused model's own distributions over its own responses.

After EAGLE-3's training-time test: every position guesses several tokens ahead, from its second guess on by the head's
own output where it has no states yet, as in the engine. Input and label always share one prefix, the response as it
is. Knows cached hidden states and the head; knows no engine.

Shape suffixes: S specialists, B responses, T positions of a response (right-padded), N response tokens of a batch, M
positions that count, C positions that are attended to or of a chunk, L guesses of a position, D hidden size, K heads of
keys, G queries of a key, E size of a head, V draft vocabulary.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ultrafuser.gating.model.draft_head import DraftHead, DraftHeadConfig
from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.gate_file import gate_digest
from ultrafuser.gating.model.responses import IGNORED_LABEL
from ultrafuser.gating.training.inputs import RunInputs
from ultrafuser.gating.training.learner import Learner
from ultrafuser.gating.training.losses import DEFAULT_CHUNK_SIZE, mix

HEAD_SIZE = 64
DISCOUNT = 0.8
"""What a guess counts, as a share of the one before it (EAGLE-3's)."""


def collate_responses(rows: Sequence[tuple[Any, ...]], eos_token_id: int, draft_ids_V: Tensor) -> dict[str, Any]:
    """Cached rows, of which states and labels are looked at, as a batch of single responses.

    A response ends with its EOS, the last one of a row also where it was cut; the engine, too, knows nothing of the
    turns before.

    Returns:
        `hidden_states`: S x [B, T, D_s]; `tokens` [B, T]: those of the responses, -100 beyond their ends; `labels`
        [B, T]: what each position is to guess, the next token, -100 where none follows or no guess could be right
        because it is outside the draft vocabulary. The loss is a mean over labels.
    """
    responses = [part for states, labels_R, *_ in rows for part in _split(states, labels_R, eos_token_id)]
    pad = nn.utils.rnn.pad_sequence
    tokens_BT = pad([tokens_R for _, tokens_R in responses], batch_first=True, padding_value=IGNORED_LABEL)
    labels_BT = _later(tokens_BT, 1, fill=IGNORED_LABEL)
    return {
        "hidden_states": [
            pad([states[index] for states, _ in responses], batch_first=True) for index in range(len(rows[0][0]))
        ],
        "tokens": tokens_BT,
        "labels": labels_BT.where(torch.isin(labels_BT, draft_ids_V), IGNORED_LABEL),
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


class DraftLearner(Learner):
    """A draft head over hidden states that were computed before; gate, embeddings and output layers are frozen.

    Its marks [X, N] of every response token are `MARKS`.
    """

    MARKS = ("accepted", "first", "outside")
    """Of a round, which begins at this position: how many guesses are right, at most `num_guesses`. Of a position that
    a token follows: whether the first guess is right; whether that token is outside the draft vocabulary."""

    def __init__(
        self,
        head: DraftHead,
        gate: Gate,
        embeddings_VD: Tensor,
        output_weights: Sequence[Tensor],
        num_guesses: int,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ) -> None:
        """`embeddings_VD`: the leader's; `output_weights`: S matrices of the draft vocabulary's rows [V, D_s], or of
        all shared ids where the gate mixes probabilities, which are shares of all of them; `chunk_size`: guesses whose
        scores exist at the same time."""
        super().__init__(gate.requires_grad_(False), len(embeddings_VD), chunk_size)
        self.draft_head = head
        self._num_guesses = num_guesses
        self._embeddings = nn.Embedding.from_pretrained(embeddings_VD, freeze=True)
        self._output_weights = nn.ParameterList(nn.Parameter(own, requires_grad=False) for own in output_weights)

    @property
    def draft_vocabulary(self) -> str:
        """Digest of the ids that can be guessed, without which the weights of the head's output layer say nothing."""
        return hashlib.sha256(str(self.draft_head.draft_ids_V.tolist()).encode()).hexdigest()

    def forward(
        self, *, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **batch: Any
    ) -> dict[str, Tensor]:
        """Soft cross-entropy of every guess against the fused distribution restricted to the draft vocabulary.

        Args:
            labels: [B, T], as `collate_responses` makes them.
            num_items_in_batch: labels of the whole step; default: the batch's.
            batch: `hidden_states` and `tokens`, likewise.

        Returns:
            `loss`: summed over guesses, discounted by how far ahead, and divided by the number of labels; `tokens_N`:
            of each label the loss of its first guess; `marks_XN`, and of which tokens they count, `is_counted_XN`; all
            but the first detached.
        """
        hidden_states, tokens_BT = batch["hidden_states"], batch["tokens"]
        with torch.no_grad():
            weights_SBT = self._weigh(hidden_states)
            embeddings_BTD = self._embeddings(tokens_BT.clamp(min=0))
        features_BTD = self.draft_head.features(hidden_states, weights_SBT)
        is_label_BT = labels != IGNORED_LABEL
        states = []
        chain = _Chain(self.draft_head)
        for _ in range(min(self._num_guesses, labels.shape[1])):
            states_BTD = chain.step(embeddings_BTD, features_BTD)
            states.append(states_BTD[is_label_BT])
            features_BTD = _earlier(states_BTD, 1)
        is_next_BT = is_label_BT[:, :-1]
        losses_LM, is_right_LM = self._compare(
            torch.stack(states),
            weights_SBT[:, :, 1:][:, is_next_BT],
            torch.searchsorted(self.draft_head.draft_ids_V, labels[is_label_BT]),
            [own_BTD[:, 1:][is_next_BT] for own_BTD in hidden_states],
        )
        ahead_L = torch.arange(len(states), device=labels.device)
        # No chain that began within the response is so far ahead at its first positions.
        is_made_LM = is_label_BT.nonzero()[:, 1] >= ahead_L[:, None]
        total = (losses_LM * is_made_LM * DISCOUNT ** ahead_L[:, None]).sum()
        count = losses_LM.shape[1] if num_items_in_batch is None else num_items_in_batch
        marks_XBT, is_counted_XBT = _marks(tokens_BT, is_label_BT, is_right_LM)
        is_token_BT = tokens_BT != IGNORED_LABEL
        return {
            "loss": total / max(count, 1),
            "tokens_N": losses_LM[0].detach(),
            "marks_XN": marks_XBT[:, is_token_BT],
            "is_counted_XN": is_counted_XBT[:, is_token_BT],
        }

    def _weigh(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """The gate's weights [S, B, T] of single responses [B, T, D_s]; the padding behind one changes none of them."""
        assert self.fusion_gate is not None
        num_responses, length = hidden_states[0].shape[:2]
        responses_N = torch.arange(num_responses, device=hidden_states[0].device).repeat_interleave(length)
        weights_SN: Tensor = self.fusion_gate([own_BTD.flatten(0, 1) for own_BTD in hidden_states], responses_N)
        return weights_SN.unflatten(1, (num_responses, length))

    def _compare(
        self, states_LMD: Tensor, next_weights_SM: Tensor, columns_M: Tensor, next_states: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The losses [L, M] of the guesses at each position that counts, and whether they are right.

        `next_states` are S tensors [M, D_s], from which the token that is guessed was drawn, `columns_M` which one of
        the draft vocabulary it is. What is as wide as the vocabulary exists for a chunk at a time, and is computed
        again for the gradient.
        """
        size = max(1, self.chunk_size // len(states_LMD))
        # Of nothing one chunk too: its loss of 0 has a gradient, for which other processes may wait.
        chunks = [slice(begin, begin + size) for begin in range(0, max(len(columns_M), 1), size)]
        parts = [
            checkpoint(
                self._compare_chunk,
                states_LMD[:, own],
                next_weights_SM[:, own],
                columns_M[own],
                *(states_MD[own] for states_MD in next_states),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for own in chunks
        ]
        losses, is_right = zip(*parts, strict=True)
        return torch.cat(losses, dim=1), torch.cat(is_right, dim=1)

    def _compare_chunk(
        self, states_LCD: Tensor, next_weights_SC: Tensor, columns_C: Tensor, *next_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert self.fusion_gate is not None
        mixture = self.fusion_gate.mixture
        logits = [own_CD @ rows_VD.T for own_CD, rows_VD in zip(next_states, self._output_weights, strict=True)]
        fused_CV = mix(next_weights_SC, logits, len(self._output_weights[0]), mixture)
        if mixture.of_probabilities:
            fused_CV = fused_CV[:, self.draft_head.draft_ids_V]
        distribution_CV = fused_CV.softmax(dim=-1)
        scores_LCV = self.draft_head.scores(states_LCD).float()
        losses_LC = -(distribution_CV * scores_LCV.log_softmax(dim=-1)).sum(dim=-1)
        return losses_LC, scores_LCV.argmax(dim=-1) == columns_C


def _marks(tokens_BT: Tensor, is_label_BT: Tensor, is_right_LM: Tensor) -> tuple[Tensor, Tensor]:
    """`DraftLearner.MARKS` [X, B, T] of all positions, and of which of them each counts."""
    # Whether all guesses from a position on were right so far; each guess looks one position further.
    is_right_BT, accepted_BT = torch.ones_like(is_label_BT), torch.zeros_like(tokens_BT)
    for ahead, is_right_M in enumerate(is_right_LM):
        is_right_BT = is_right_BT & _later(torch.zeros_like(is_label_BT).masked_scatter(is_label_BT, is_right_M), ahead)
        accepted_BT = accepted_BT + is_right_BT
    is_followed_BT = _later(tokens_BT != IGNORED_LABEL, 1)
    marks = torch.stack([accepted_BT, accepted_BT > 0, ~is_label_BT]).float()
    return marks, torch.stack([_round_begins(accepted_BT, is_followed_BT), is_followed_BT, is_followed_BT])


def _round_begins(accepted_BT: Tensor, is_followed_BT: Tensor) -> Tensor:
    """Where the engine would draft: at a response's first token, then at the last one that a round has given, which is
    one more than its right guesses."""
    begins = torch.zeros_like(is_followed_BT, device="cpu")
    rows = zip(begins, accepted_BT.tolist(), is_followed_BT.sum(dim=1).tolist(), strict=True)
    for begins_T, accepted_T, length in rows:
        position = 0
        while position < length:
            begins_T[position] = True
            position += accepted_T[position] + 1
    return begins.to(is_followed_BT.device)


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
        """What all positions see [B, T, H E]: a window of them at a time, with the two windows that these can see."""
        num_steps = len(self._keys_values) - 1
        (keys_BTKE, values_BTKE), *chain = self._keys_values
        chain = [
            (_earlier(keys, num_steps - index), _earlier(values, num_steps - index))
            for index, (keys, values) in enumerate(chain, start=1)
        ]
        window, length = self._head.config.window, len(positions_T)
        attended = []
        for begin in range(0, length, window):
            own = slice(begin, begin + window)
            seen = slice(max(0, begin - window + 1), begin + window)
            back_TC = positions_T[own, None] - positions_T[seen]
            attended.append(
                checkpoint(
                    _attend_to,
                    queries_BTKGE[:, own],
                    keys_BTKE[:, seen],
                    values_BTKE[:, seen],
                    (back_TC >= num_steps) & (back_TC < window),
                    *(tensor_BTKE[:, own] for pair in chain for tensor_BTKE in pair),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        return torch.cat(attended, dim=1)


def _attend_to(
    queries_BTKGE: Tensor, keys_BCKE: Tensor, values_BCKE: Tensor, is_seen_TC: Tensor, *chain: Tensor
) -> Tensor:
    """Each query over what it sees of the keys, and over its own of the chain: keys and values [B, T, K, E] in turn.

    Scores are as large as the keys are many: they are computed again for the gradient.
    """
    scores_BTKGC = torch.einsum("btkge,bcke->btkgc", queries_BTKGE, keys_BCKE).float()
    scores_BTKGC = scores_BTKGC.masked_fill(~is_seen_TC[:, None, None], torch.finfo(torch.float32).min)
    own = [torch.einsum("btkge,btke->btkg", queries_BTKGE, keys).float().unsqueeze(-1) for keys in chain[::2]]
    weights = torch.cat([scores_BTKGC, *own], dim=-1).softmax(dim=-1).to(values_BCKE.dtype)
    num_keys = keys_BCKE.shape[1]
    attended_BTKGE = torch.einsum("btkgc,bcke->btkge", weights[..., :num_keys], values_BCKE)
    for index, values in enumerate(chain[1::2]):
        attended_BTKGE = attended_BTKGE + weights[..., num_keys + index].unsqueeze(-1) * values.unsqueeze(-2)
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
