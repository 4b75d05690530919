"""What the mixture did in each row of a step on a CPU, small enough to travel with the step.

Knows tensors, not requests. Asking is free here and every pass over the logits counts, so that no more is computed than
has to be. On a GPU `server/engine/worker/mix_kernel.py` gives the same.

Shapes: S specialists, B rows that end in a token, D hidden size, V shared token ids, X = S + 3 marks of a row.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def observe(
    weights_SB: Tensor, hidden_SBD: Sequence[Tensor], logits_SBV: Sequence[Tensor], fused_BV: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Compare the specialists' logits [B, V] with each other and with the fused ones, and look for NaN and infinity.

    A specialist is not finite if one of its hidden states or logits is not; the gate, if a weight is not and no
    specialist is to blame. The other marks of such a row mean nothing.

    Returns:
        Marks, float32 [S + 3, B]: the S weights; 1 if the mixture's best token is another than that of the specialist
        with the largest weight; how many specialists agree on one best token; whose values are not finite, as the sum
        of their 2^s, and 2^S for the gate.
        Which rows [B] are not finite; None if it is known that all are.
    """
    best_SB = torch.stack([_argmax(logits_BV) for logits_BV in logits_SBV])
    leaders_best_1B = best_SB.gather(0, weights_SB.argmax(dim=0, keepdim=True))
    is_overridden_B = fused_BV.gather(1, leaders_best_1B.T)[:, 0] < fused_BV.amax(dim=-1)
    num_agreeing_B = (best_SB[:, None] == best_SB[None]).sum(dim=1).amax(dim=0)
    if _all_are_finite(hidden_SBD, fused_BV):
        culprits_B, is_nonfinite_B = torch.zeros(len(fused_BV)), None
    else:
        culprits_B = _culprits(weights_SB, hidden_SBD, logits_SBV)
        is_nonfinite_B = culprits_B > 0
    marks = [weights_SB, is_overridden_B[None], num_agreeing_B[None], culprits_B[None]]
    return torch.cat(marks), is_nonfinite_B


def neutralize(logits_BV: Tensor, is_nonfinite_B: Tensor | None) -> None:
    """Make rows harmless for the sampler, in place: every token as likely as any other."""
    if is_nonfinite_B is not None:
        logits_BV.masked_fill_(is_nonfinite_B[:, None], 0.0)


def _argmax(logits_BV: Tensor) -> Tensor:
    # torch looks at one value after the other there, NumPy at many.
    return torch.from_numpy(logits_BV.float().numpy().argmax(axis=-1))


def _all_are_finite(hidden_SBD: Sequence[Tensor], fused_BV: Tensor) -> bool:
    """Whether a quick look finds nothing suspicious.

    A weight or a logit that is not finite makes the fused logits so, and anything that is not finite makes a sum so.
    """
    sums = [values.sum(dtype=torch.float32) for values in (fused_BV, *hidden_SBD)]
    return math.isfinite(float(sum(sums)))


def _culprits(weights_SB: Tensor, hidden_SBD: Sequence[Tensor], logits_SBV: Sequence[Tensor]) -> Tensor:
    is_bad_SB = ~torch.stack(
        [_is_finite(hidden) & _is_finite(logits) for hidden, logits in zip(hidden_SBD, logits_SBV, strict=True)]
    )
    gate_is_bad_B = ~torch.isfinite(weights_SB).all(dim=0) & ~is_bad_SB.any(dim=0)
    flags = torch.cat([is_bad_SB, gate_is_bad_B[None]])
    powers = torch.pow(2.0, torch.arange(len(flags), device=flags.device))  # exact in float32 for 24 flags
    return (flags * powers[:, None]).sum(dim=0)


def _is_finite(values_BX: Tensor) -> Tensor:
    """Whether whole rows are; the extremes are quicker than a look at every value, and NaN is one of them."""
    return torch.isfinite(values_BX.amax(dim=-1)) & torch.isfinite(values_BX.amin(dim=-1))
