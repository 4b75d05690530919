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

_TINY = 1e-30
"""Probabilities below lose digits in float32, and are zero below 1e-45."""


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
        float32 logits [B, num_shared_ids]; finite where weights and logits are. Differentiable in all of them.
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
    """By probabilities, with one exponential a logit; rows in which one is next to nothing by their logarithms.

    A logit of minus infinity is no error to a distribution. It is one of a model: it makes its row NaN.
    """
    mixed_BV: Tensor | None = None
    for index, (weights_B, logits_BV) in enumerate(zip(weights_SB, logits, strict=True)):
        own_BV = _scaled(logits_BV[:, :num_shared_ids], index, scales_S)
        shares_B1 = (weights_B + 0 * own_BV.detach().amin(dim=-1)).unsqueeze(1)
        own_BV = own_BV.softmax(dim=-1)
        mixed_BV = own_BV * shares_B1 if mixed_BV is None else mixed_BV.addcmul_(own_BV, shares_B1)
    assert mixed_BV is not None
    is_tiny_B = mixed_BV.amin(dim=-1) < _TINY
    if not is_tiny_B.any():
        return mixed_BV.log_()
    mixed_BV[is_tiny_B] = 1  # no logarithm, and no gradient, of zero
    mixed_BV = mixed_BV.log()
    tiny = [logits_BV[is_tiny_B, :num_shared_ids] for logits_BV in logits]
    mixed_BV[is_tiny_B] = _by_logarithms(weights_SB[:, is_tiny_B], tiny, scales_S)
    return mixed_BV


def _by_logarithms(weights_SB: Tensor, logits_SBV: Sequence[Tensor], scales_S: Tensor | None) -> Tensor:
    """A token that every specialist thinks impossible keeps its rank among such tokens: nothing becomes zero."""
    # A weight that is zero in float32 is taken for the smallest number, so that no logarithm is minus infinity.
    log_weights_SB = weights_SB.clamp(min=torch.finfo(torch.float32).tiny).log()
    parts = [
        _scaled(logits_BV, index, scales_S).log_softmax(dim=-1) + log_weights_SB[index].unsqueeze(1)
        for index, logits_BV in enumerate(logits_SBV)
    ]
    return torch.stack(parts).logsumexp(dim=0)


def _scaled(logits_BV: Tensor, index: int, scales_S: Tensor | None) -> Tensor:
    return logits_BV.float() if scales_S is None else logits_BV.float() * scales_S[index]
