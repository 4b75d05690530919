"""Mixing and its marks on a GPU, in two kernels: the logits are read once, whatever is asked of them.

Gives what `fuse` (`gating/model/mixture.py`), `observe` and `neutralize` (`server/engine/worker/observing.py`) give,
for which torch starts some eighty kernels. Where probabilities are mixed torch reads the logits once more before, for
what each specialist's sum to. Knows tensors on one device, nothing else.

Shapes: S specialists, B rows that end in a token, D hidden size, V vocabulary, W width of the result, C blocks of ids,
X = S + 3 marks of a row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton

from ultrafuser.gating.model.mixture import PAPERS_MIXTURE, Mixture

_BLOCK = 2048
"""Ids that one program reads."""


def mix_and_mark(
    weights_SB: Tensor,
    hidden_SBD: Sequence[Tensor],
    logits_SBV: Sequence[Tensor],
    num_shared_ids: int,
    width: int,
    mixture: Mixture = PAPERS_MIXTURE,
) -> tuple[Tensor, Tensor]:
    """Fused logits [B, W], float32, -inf from `num_shared_ids` on, and marks [X, B] as `observe` describes them.

    Rows that are not finite have equal logits. Values of a row lie side by side; rows may be apart, but begin where the
    device's loads are aligned, or the kernels are compiled again.
    """
    assert all(rows.stride(1) == 1 for rows in logits_SBV)
    num_specialists, num_rows = weights_SB.shape
    num_blocks = triton.cdiv(width, _BLOCK)
    own: dict[str, Any] = {"device": weights_SB.device}
    mixed_BW = torch.empty(num_rows, width, dtype=torch.float32, **own)
    marks_XB = torch.empty(num_specialists + 3, num_rows, dtype=torch.float32, **own)
    best_SBC = torch.empty(num_specialists, num_rows, num_blocks, dtype=torch.float32, **own)
    ids_SBC, is_bad_SBC = (torch.empty_like(best_SBC, dtype=torch.int32) for _ in range(2))
    best_mixed_BC = torch.empty(num_rows, num_blocks, dtype=torch.float32, **own)
    weights_SB = weights_SB.contiguous()
    factors_SB, shifts_SB = _factors_and_shifts(weights_SB, logits_SBV, num_shared_ids, mixture)
    found = (best_SBC, ids_SBC, is_bad_SBC, best_mixed_BC)
    sizes = (num_rows, width, num_blocks)
    _mix[(num_rows, num_blocks)](
        tuple(logits_SBV), tuple(rows.stride(0) for rows in logits_SBV), factors_SB, shifts_SB, mixed_BW,
        *found, *sizes,
        NUM_SHARED=num_shared_ids, S=num_specialists, BLOCK=_BLOCK, OF_PROBABILITIES=mixture.of_probabilities,
    )  # fmt: skip
    _mark[(num_rows,)](
        tuple(hidden_SBD), tuple(rows.stride(0) for rows in hidden_SBD), tuple(rows.shape[1] for rows in hidden_SBD),
        weights_SB, mixed_BW, marks_XB, *found, *sizes,
        NUM_SHARED=num_shared_ids, S=num_specialists, BLOCK=_BLOCK, BLOCK_C=triton.next_power_of_2(num_blocks),
        BLOCK_D=triton.next_power_of_2(max(rows.shape[1] for rows in hidden_SBD)),
    )  # fmt: skip
    return mixed_BW, marks_XB


def _factors_and_shifts(
    weights_SB: Tensor, logits_SBV: Sequence[Tensor], num_shared_ids: int, mixture: Mixture
) -> tuple[Tensor, Tensor]:
    """By what logits are multiplied before they are added up; or by what, and what is added to them then, to have the
    logarithms of what is added up."""
    if not mixture.of_probabilities:
        return (weights_SB if mixture.scales_S is None else weights_SB * mixture.scales_S[:, None]), weights_SB
    scales_S = torch.ones_like(weights_SB[:, 0]) if mixture.scales_S is None else mixture.scales_S
    sums = [
        (logits_BV[:, :num_shared_ids].float() * scale).logsumexp(dim=-1)
        for scale, logits_BV in zip(scales_S, logits_SBV, strict=True)
    ]
    smallest = torch.finfo(torch.float32).tiny  # as in `fuse`
    factors_SB = scales_S[:, None].expand_as(weights_SB).contiguous()
    return factors_SB, weights_SB.clamp(min=smallest).log() - torch.stack(sums)


@triton.jit(do_not_specialize=["num_rows", "strides_S"])
def _mix(  # type: ignore[no-untyped-def]
    logits_SBV, strides_S, factors_SB, shifts_SB, mixed_BW, best_SBC, ids_SBC, is_bad_SBC, best_mixed_BC,
    num_rows, width, num_blocks,
    NUM_SHARED: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, OF_PROBABILITIES: tl.constexpr,
):  # fmt: skip
    """One block of ids of one row: the fused logits, and of each specialist and of the mixture what is largest."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    is_shared = ids < NUM_SHARED
    mixed = tl.zeros([BLOCK], tl.float32)
    if OF_PROBABILITIES:
        mixed -= float("inf")
    for s in tl.static_range(S):
        logits = tl.load(logits_SBV[s] + row * strides_S[s] + ids, mask=is_shared, other=0.0).to(tl.float32)
        own = tl.load(factors_SB + s * num_rows + row) * logits
        if OF_PROBABILITIES:
            own += tl.load(shifts_SB + s * num_rows + row)
            larger = tl.maximum(mixed, own)
            mixed = larger + tl.log(tl.exp(mixed - larger) + tl.exp(own - larger))
        else:
            mixed += own
        best, index = tl.max(tl.where(is_shared, logits, -float("inf")), axis=0, return_indices=True)
        place = (s * num_rows + row) * num_blocks + block
        tl.store(best_SBC + place, best)
        tl.store(ids_SBC + place, tl.minimum(block * BLOCK + index, NUM_SHARED - 1))
        tl.store(is_bad_SBC + place, tl.max((~(tl.abs(logits) < float("inf"))).to(tl.int32), axis=0))
    mixed = tl.where(is_shared, mixed, -float("inf"))
    tl.store(mixed_BW + row * width + ids, mixed, mask=ids < width)
    tl.store(best_mixed_BC + row * num_blocks + block, tl.max(mixed, axis=0))


@triton.jit
def _best_id(best_SBC, ids_SBC, start, num_blocks, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    """The id of the largest logit, of those that are largest in their blocks."""
    blocks = tl.arange(0, BLOCK_C)
    best = tl.load(best_SBC + start + blocks, mask=blocks < num_blocks, other=-float("inf"))
    _, index = tl.max(best, axis=0, return_indices=True)
    return tl.load(ids_SBC + start + tl.minimum(index, num_blocks - 1))


@triton.jit(do_not_specialize=["num_rows", "strides_S"])
def _mark(  # type: ignore[no-untyped-def]
    hidden_SBD, strides_S, sizes_S, weights_SB, mixed_BW, marks_XB, best_SBC, ids_SBC, is_bad_SBC, best_mixed_BC,
    num_rows, width, num_blocks,
    NUM_SHARED: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row's marks; its logits are made equal if a value is not finite."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCK_C)
    largest = -float("inf")
    leaders_best = tl.zeros([], tl.int32)
    num_agreeing = tl.zeros([], tl.int32)
    culprits = tl.zeros([], tl.int32)
    is_gate_bad = False
    for s in tl.static_range(S):
        weight = tl.load(weights_SB + s * num_rows + row)
        tl.store(marks_XB + s * num_rows + row, weight)
        is_gate_bad = is_gate_bad | (~(tl.abs(weight) < float("inf")))
        start = (s * num_rows + row) * num_blocks
        best_id = _best_id(best_SBC, ids_SBC, start, num_blocks, BLOCK_C)
        num_alike = 0
        for t in tl.static_range(S):
            other = _best_id(best_SBC, ids_SBC, (t * num_rows + row) * num_blocks, num_blocks, BLOCK_C)
            num_alike += (other == best_id).to(tl.int32)
        num_agreeing = tl.maximum(num_agreeing, num_alike)
        leaders_best = tl.where(weight > largest, best_id, leaders_best)
        largest = tl.maximum(largest, weight)
        columns = tl.arange(0, BLOCK_D)
        hidden = tl.load(hidden_SBD[s] + row * strides_S[s] + columns, mask=columns < sizes_S[s], other=0.0)
        is_bad = tl.max((~(tl.abs(hidden.to(tl.float32)) < float("inf"))).to(tl.int32), axis=0)
        is_bad |= tl.max(tl.load(is_bad_SBC + start + blocks, mask=blocks < num_blocks, other=0), axis=0)
        culprits += is_bad << s
    culprits = tl.where((culprits == 0) & is_gate_bad, 1 << S, culprits)
    best_mixed = tl.max(
        tl.load(best_mixed_BC + row * num_blocks + blocks, mask=blocks < num_blocks, other=-float("inf"))
    )
    leaders_mixed = tl.load(mixed_BW + row * width + leaders_best)
    tl.store(marks_XB + S * num_rows + row, (leaders_mixed < best_mixed).to(tl.float32))
    tl.store(marks_XB + (S + 1) * num_rows + row, num_agreeing.to(tl.float32))
    tl.store(marks_XB + (S + 2) * num_rows + row, culprits.to(tl.float32))
    if culprits != 0:
        for first in range(0, NUM_SHARED, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            tl.store(mixed_BW + row * width + ids, tl.zeros([BLOCK], tl.float32), mask=ids < NUM_SHARED)
