"""Where the response tokens of a conversation are in one specialist's own sequence, and what it makes of them there.

Shape suffixes: B requests, T positions, R response tokens (right-padded), N response tokens of all requests (one
request after the other), D hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Responses:
    """Response tokens of one specialist's sequences, moved together to the left."""

    tokens_BR: Tensor
    """The tokens; -100 beyond a request's last one."""

    predictors_BR: Tensor
    """The positions whose hidden states predict them; 0 beyond the last one."""

    turns_BR: Tensor
    """Of which response of all, row after row, each token is; -1 beyond the last one."""


def gather_responses(ids_BT: Tensor, response_mask_BT: Tensor) -> Responses:
    """Find the response tokens of padded conversations, all turns of a conversation in one row.

    Args:
        ids_BT: token ids, padded on either side.
        response_mask_BT: true at every response token.

    Raises:
        ValueError: no response token in the batch, or one at the first position.
    """
    response_mask_BT = response_mask_BT.bool()
    num_tokens_B = response_mask_BT.sum(dim=1)
    if not bool(num_tokens_B.any()):
        raise ValueError("response_mask: no response tokens in the batch; there is nothing to learn from")
    if bool(response_mask_BT[:, 0].any()):
        raise ValueError("response_mask: a response cannot start at the first position; nothing comes before it")
    # A stable sort brings the response positions to the front, in their order.
    positions_BT = (~response_mask_BT).long().sort(dim=1, stable=True).indices
    positions_BR = positions_BT[:, : int(num_tokens_B.max())]
    exists_BR = torch.arange(positions_BR.shape[1], device=ids_BT.device) < num_tokens_B.unsqueeze(1)
    return Responses(
        tokens_BR=ids_BT.gather(1, positions_BR).where(exists_BR, IGNORED_LABEL),
        predictors_BR=(positions_BR - 1).where(exists_BR, 0),
        turns_BR=_turns(response_mask_BT).gather(1, positions_BR).where(exists_BR, -1),
    )


def response_turns(response_mask_BT: Tensor) -> Tensor:
    """[N]: of which response each token is, counted over the rows; one ends where another kind of token stands."""
    response_mask_BT = response_mask_BT.bool()
    return _turns(response_mask_BT)[response_mask_BT]


def _turns(response_mask_BT: Tensor) -> Tensor:
    """[B, T]: how many responses have begun, in all rows up to this position, less one."""
    begins_BT = response_mask_BT.clone()
    begins_BT[:, 1:] &= ~response_mask_BT[:, :-1]
    return begins_BT.flatten().cumsum(dim=0).view_as(begins_BT) - 1


def response_states(specialist: Any, ids_BT: Tensor, mask_BT: Tensor, response_mask_BT: Tensor) -> Tensor:
    """[N, D]: after the final norm, one position before every response token. No graph if the specialist is frozen."""
    learns = any(parameter.requires_grad for parameter in specialist.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
        return last_hidden_states(specialist, ids_BT, mask_BT)[:, :-1][response_mask_BT[:, 1:]]


def last_hidden_states(specialist: Any, ids_BT: Tensor, mask_BT: Tensor, cache: Cache | None = None) -> Tensor:
    """[B, T, D] after the final norm; positions count the real tokens of a row, whatever padding is before them."""
    positions_BT = (mask_BT.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
    states_BTD: Tensor = specialist.base_model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return states_BTD
