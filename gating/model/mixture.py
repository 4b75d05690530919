"""Mixing: the specialists' logits, and how much each of them counts, become one row of logits.

Shape suffixes: S specialists, B rows, V vocabulary rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Mixture(NamedTuple):
    """How weights and logits o_s become fused logits; by default as in the paper: sum over s of w_s * o_s."""

    scales_S: Tensor | None = None
    """What each specialist's logits are multiplied by before all else, 1 / temperature, float32; None: by one."""

    of_probabilities: bool = False
    """log of the sum over s of w_s * softmax(scale_s * o_s), over the shared ids: log probabilities, which sum to one
    once exponentiated, whereas mixed logits are known up to a number only."""


PAPERS_MIXTURE = Mixture()


def fuse(
    weights_SB: Tensor, logits: Sequence[Tensor], num_shared_ids: int, mixture: Mixture = PAPERS_MIXTURE
) -> Tensor:
    """Mix the specialists' logits on the shared vocabulary.

    Args:
        weights_SB: float32 mixing weights [S, B].
        logits: S tensors [B, V_s] in any float dtype; V_s >= num_shared_ids.
        num_shared_ids: ids 0..num_shared_ids-1 mean the same token for every specialist.
        mixture: how.

    Returns:
        float32 logits [B, num_shared_ids]; finite where weights and logits are.
    """
    assert weights_SB.shape[0] == len(logits)
    if mixture.of_probabilities:
        return _fuse_probabilities(weights_SB, logits, num_shared_ids, mixture.scales_S)
    if mixture.scales_S is not None:
        weights_SB = weights_SB * mixture.scales_S.unsqueeze(1)
    fused_BV = logits[0][:, :num_shared_ids].float() * weights_SB[0].unsqueeze(1)
    for weights_B, logits_BV in zip(weights_SB[1:], logits[1:], strict=True):
        fused_BV.addcmul_(weights_B.unsqueeze(1), logits_BV[:, :num_shared_ids].float())
    return fused_BV


def _fuse_probabilities(
    weights_SB: Tensor, logits: Sequence[Tensor], num_shared_ids: int, scales_S: Tensor | None
) -> Tensor:
    """In logarithms throughout: a token that every specialist thinks impossible keeps its rank among such tokens."""
    fused_BV: Tensor | None = None
    # A weight that is zero in float32 is taken for the smallest number, so that no logarithm is minus infinity.
    log_weights_SB = weights_SB.clamp(min=torch.finfo(torch.float32).tiny).log()
    for index, (log_weight_B, logits_BV) in enumerate(zip(log_weights_SB, logits, strict=True)):
        own_BV = logits_BV[:, :num_shared_ids].float()
        if scales_S is not None:
            own_BV = own_BV * scales_S[index]
        own_BV = own_BV.log_softmax(dim=-1) + log_weight_B.unsqueeze(1)
        fused_BV = own_BV if fused_BV is None else torch.logaddexp(fused_BV, own_BV)
    assert fused_BV is not None
    return fused_BV
