"""What the mixture did in each row of a step, computed where the logits are and small enough to travel with the step.

Knows tensors, not requests. Nothing here waits for the device.

Shapes: S specialists, B rows that end in a token, D hidden size, V shared token ids, X = S + 3 marks of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GROUP = 256
"""Values whose maximum the CPU takes at once."""


@dataclass(frozen=True)
class Observation:
    """What is to be known of a step's rows."""

    marks_XB: Tensor
    """float32 [S + 3, B]: the S weights; 1 if the mixture's best token is another than the leading specialist's; how
    many specialists agree on one best token; whose values are not finite, a sum of 2^s, and of 2^S for the gate."""

    is_nonfinite_B: Tensor
    """Whether anything of the row is NaN or infinite."""


def observe(
    weights_SB: Tensor, hidden_SBD: Sequence[Tensor], logits_SBV: Sequence[Tensor], fused_BV: Tensor
) -> Observation:
    """Compare the specialists' logits [B, V] with each other and with the fused ones.

    A specialist is not finite if one of its hidden states or logits is NaN or infinite; the gate, if a weight is and
    no specialist is to blame. The other marks of such a row mean nothing.
    """
    best_SB = torch.stack([_argmax(logits_BV) for logits_BV in logits_SBV])
    leaders_best_B1 = best_SB.gather(0, weights_SB.argmax(dim=0)[None]).T
    is_overridden_B = fused_BV.gather(1, leaders_best_B1)[:, 0] < fused_BV.amax(dim=-1)
    num_agreeing_B = (best_SB[:, None] == best_SB[None]).sum(dim=1).amax(dim=0)
    culprits_B = _culprits(weights_SB, hidden_SBD, logits_SBV, fused_BV)
    marks = torch.stack([is_overridden_B.float(), num_agreeing_B.float(), culprits_B])
    return Observation(torch.cat([weights_SB, marks]), culprits_B > 0)


def neutralize(logits_BV: Tensor, is_nonfinite_B: Tensor) -> None:
    """Make rows harmless for the sampler, in place: every token as likely as any other."""
    if logits_BV.device.type == "cpu" and not is_nonfinite_B.any():
        return  # saves a pass over all logits; on a GPU the question would wait for the device
    logits_BV.masked_fill_(is_nonfinite_B[:, None], 0.0)


def _culprits(
    weights_SB: Tensor, hidden_SBD: Sequence[Tensor], logits_SBV: Sequence[Tensor], fused_BV: Tensor
) -> Tensor:
    hidden_is_finite_SB = torch.stack([_is_finite(hidden_BD.float()) for hidden_BD in hidden_SBD])
    if fused_BV.device.type == "cpu" and (hidden_is_finite_SB.all(dim=0) & _is_finite(fused_BV)).all():
        # A weight or logit that is not finite makes the sum so, too. On a GPU the question would wait for the device.
        return torch.zeros(fused_BV.shape[0])
    logits_are_finite_SB = torch.stack([_is_finite(logits_BV) for logits_BV in logits_SBV])
    is_bad_SB = ~(hidden_is_finite_SB & logits_are_finite_SB)
    gate_is_bad_B = ~torch.isfinite(weights_SB).all(dim=0) & ~is_bad_SB.any(dim=0)
    flags = torch.cat([is_bad_SB, gate_is_bad_B[None]])
    powers = torch.pow(2.0, torch.arange(len(flags), device=flags.device))  # exact in float32 for 24 flags
    return (flags * powers[:, None]).sum(dim=0)


def _is_finite(values_BX: Tensor) -> Tensor:
    """Whether whole rows are; the extremes are quicker than a look at every value, and NaN is one of them."""
    return torch.isfinite(values_BX.amax(dim=-1)) & torch.isfinite(values_BX.amin(dim=-1))


def _argmax(logits_BV: Tensor) -> Tensor:
    if logits_BV.device.type != "cpu":
        return logits_BV.argmax(dim=-1)
    return _argmax_on_cpu(logits_BV.float())  # half precision is slow to look through


def _argmax_on_cpu(values_BV: Tensor) -> Tensor:
    """As `argmax`, which looks at one value after the other: first the best group, by its maximum, then within it."""
    num_grouped = values_BV.shape[1] - values_BV.shape[1] % _GROUP
    if num_grouped == 0:
        return values_BV.argmax(dim=-1)
    groups_BGK = values_BV[:, :num_grouped].unflatten(1, (num_grouped // _GROUP, _GROUP))
    group_B = groups_BGK.amax(dim=-1).argmax(dim=-1)
    within_B = groups_BGK[torch.arange(len(group_B)), group_B].argmax(dim=-1)
    best_B = group_B * _GROUP + within_B
    if num_grouped == values_BV.shape[1]:
        return best_B
    last_B = values_BV[:, num_grouped:].argmax(dim=-1) + num_grouped
    both_B2 = torch.stack([best_B, last_B], dim=1)
    return both_B2.gather(1, values_BV.gather(1, both_B2).argmax(dim=1, keepdim=True))[:, 0]
