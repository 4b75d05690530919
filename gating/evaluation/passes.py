"""Teacher-forced passes: the loss of every response token under any mix of models, each model run once over the rows.

The models' hidden states come from the cache (`gating/data/hidden_states.py`); here they become logits, a chunk of
tokens at a time, and every mix (one model alone, all with equal weights, the gate) is read off the same logits. Knows
tensors; does not know files or fusions.

Shape suffixes: S models, N response tokens of all rows, R of one, C of a chunk, D hidden size, V shared vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ultrafuser.gating.data.hidden_states import CachedHiddenStates
from ultrafuser.gating.model.cache import Tick
from ultrafuser.gating.model.mixture import PAPERS_MIXTURE, Mixture, fuse

CHUNK_SIZE = 256
"""Tokens whose logits exist at the same time."""


class Mix(Protocol):
    """How the logits of S models become one. A `Gate` is one."""

    @property
    def mixture(self) -> Mixture:
        """How weights mix logits."""

    def __call__(self, hidden_states: Sequence[Tensor], responses_N: Tensor | None, /) -> Tensor:
        """Weights [S, N], float32, of S hidden states [N, D_s] of whole responses."""


@dataclass(frozen=True)
class Reading:
    """What the mixes make of some rows."""

    losses: Mapping[str, Tensor]
    """Nats of every token, float32 [N], by mix."""

    weights: Mapping[str, Tensor]
    """float32 [S, N], by mix."""

    offsets: Sequence[int]
    """Row i has the tokens from `offsets[i]` to `offsets[i + 1]`."""

    responses_N: Tensor
    """Of which response each token is, numbered through; every turn of a row is one."""


@dataclass(frozen=True)
class FixedWeights:
    """Every token's logits with the same weights, S in all."""

    weights: tuple[float, ...]
    mixture: Mixture = PAPERS_MIXTURE

    def __call__(self, hidden_states: Sequence[Tensor], responses_N: Tensor | None = None, /) -> Tensor:
        """[S, N], as of any `Mix`."""
        first_ND = hidden_states[0]
        return torch.tensor(self.weights, device=first_ND.device).unsqueeze(1).expand(-1, len(first_ND))


def alone(index: int, num_models: int) -> Mix:
    """One model's logits as they are."""
    return FixedWeights(tuple(float(number == index) for number in range(num_models)))


@torch.no_grad()
def read(
    states: CachedHiddenStates,
    output_weights: Sequence[Tensor],
    mixes: Mapping[str, Mix],
    *,
    device: torch.device,
    tick: Tick,
) -> Reading:
    """-log softmax(fused logits)[label] of every token, for every mix (paper: "The model").

    Weights first, row by row, as a gate may look back within a response; then logits, whatever the rows, of which each
    model's are made once for all mixes.

    Args:
        states: of S models.
        output_weights: S matrices [V, D_s].
        mixes: by name.
        device: where logits are computed.
        tick: told the share that is done.
    """
    layers = [weight_VD.to(device) for weight_VD in output_weights]
    num_tokens = states.offsets[-1]
    losses = {name: torch.empty(num_tokens) for name in mixes}
    weights = {name: torch.empty(len(layers), num_tokens) for name in mixes}
    for index, (begin, end) in enumerate(pairwise(states.offsets)):
        own_states, _, responses_R = states[index]
        own_states = [state_RD.to(device) for state_RD in own_states]
        for name, mix in mixes.items():
            weights[name][:, begin:end] = mix(own_states, responses_R.to(device)).cpu()
    for begin in range(0, num_tokens, CHUNK_SIZE):
        tick(begin / num_tokens)
        tokens = slice(begin, begin + CHUNK_SIZE)
        hidden_states, labels_C = states.tokens(begin, begin + CHUNK_SIZE)
        hidden_states = [hidden_CD.to(device) for hidden_CD in hidden_states]
        logits = [hidden_CD @ layer_VD.T for hidden_CD, layer_VD in zip(hidden_states, layers, strict=True)]
        for name, mix in mixes.items():
            fused_CV = fuse(weights[name][:, tokens].to(device), logits, len(layers[0]), mix.mixture)
            losses[name][tokens] = functional.cross_entropy(fused_CV, labels_C.to(device), reduction="none").cpu()
    return Reading(losses, weights, states.offsets, states.responses_N)
