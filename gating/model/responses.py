"""Where the response tokens of a conversation are in one specialist's own sequence. Knows masks and ids, no models.

Shape suffixes: B requests, T positions, R response tokens (right-padded).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Responses:
    """Response tokens of one specialist's sequences, moved together to the left."""

    tokens_BR: Tensor
    """The tokens; -100 beyond a request's last one."""

    predictors_BR: Tensor
    """The positions whose hidden states predict them; 0 beyond the last one."""


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
    )
