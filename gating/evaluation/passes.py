"""Teacher-forced passes: the loss of every response token under any mix of models, each model run once over the rows.

The models' hidden states come from the cache (`gating/data/hidden_states.py`); here they become logits, a chunk of
tokens at a time, and every mix (one model alone, all with equal weights, the gate) is read off the same logits. Knows
tensors; does not know files or fusions.

Shape suffixes: S models, N response tokens of all rows, C of a chunk, D hidden size, V shared vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ultrafuser.gating.data.hidden_states import CachedHiddenStates
from ultrafuser.gating.model.cache import Tick
from ultrafuser.gating.model.mixture import fuse

CHUNK_SIZE = 256
"""Tokens whose logits exist at the same time."""

Mix = Callable[[Sequence[Tensor]], Tensor]
"""S hidden states [C, D_s] to weights [S, C], float32. A `Gate` is one."""


@dataclass(frozen=True)
class Reading:
    """What the mixes make of some rows."""

    losses: Mapping[str, Tensor]
    """Nats of every token, float32 [N], by mix."""

    weights: Mapping[str, Tensor]
    """float32 [S, N], by mix."""

    offsets: Sequence[int]
    """Row i has the tokens from `offsets[i]` to `offsets[i + 1]`."""


def fixed(weights: Sequence[float]) -> Mix:
    """Every token's logits with the same weights, S in all."""

    def mix(hidden_states: Sequence[Tensor]) -> Tensor:
        first_CD = hidden_states[0]
        return torch.tensor(weights, device=first_CD.device).unsqueeze(1).expand(-1, len(first_CD))

    return mix


def alone(index: int, num_models: int) -> Mix:
    """One model's logits as they are."""
    return fixed([float(number == index) for number in range(num_models)])


@torch.no_grad()
def read(
    states: CachedHiddenStates,
    output_weights: Sequence[Tensor],
    mixes: Mapping[str, Mix],
    *,
    device: torch.device,
    tick: Tick,
) -> Reading:
    """-log softmax(sum over s of w_s * o_s)[label] of every token, for every mix (paper: "The model").

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
    for begin in range(0, num_tokens, CHUNK_SIZE):
        tick(begin / num_tokens)
        tokens = slice(begin, begin + CHUNK_SIZE)
        hidden_states, labels_C = states.tokens(begin, begin + CHUNK_SIZE)
        hidden_states = [hidden_CD.to(device) for hidden_CD in hidden_states]
        logits = [hidden_CD @ layer_VD.T for hidden_CD, layer_VD in zip(hidden_states, layers, strict=True)]
        for name, mix in mixes.items():
            weights_SC = mix(hidden_states)
            fused_CV = fuse(weights_SC, logits, len(layers[0]))
            losses[name][tokens] = functional.cross_entropy(fused_CV, labels_C.to(device), reduction="none").cpu()
            weights[name][:, tokens] = weights_SC.cpu()
    return Reading(losses, weights, states.offsets)
