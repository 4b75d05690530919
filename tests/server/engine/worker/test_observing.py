"""What is found in a step's rows, against plain definitions on random logits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ultrafuser.server.engine.worker.observing import neutralize, observe

NAN, INF = math.nan, math.inf


def observed(
    num_shared: int = 1000, changes: dict[str, tuple[int, int]] | None = None, value: float = 0.0
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Marks, rows that are not finite, and the tensors: three specialists, five rows.

    `changes` says where to put the value: a tensor's name, specialist and row.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {
        "weights": torch.rand(3, 5, generator=generator).softmax(dim=0),
        "hidden": [torch.randn(5, 8, generator=generator) for _ in range(3)],
        "logits": [torch.randn(5, num_shared, generator=generator).to(torch.bfloat16) for _ in range(3)],
    }
    tensors["logits"][1][2] = tensors["logits"][0][2]
    tensors["logits"][2][2:4] = tensors["logits"][0][2:4]
    for name, (specialist, row) in (changes or {}).items():
        target = tensors[name][specialist][row]
        target[-1 if target.dim() else ...] = value
    tensors["fused"] = sum(
        weights_B[:, None] * logits.float()
        for weights_B, logits in zip(tensors["weights"], tensors["logits"], strict=True)
    )
    marks, rows = observe(tensors["weights"], tensors["hidden"], tensors["logits"], tensors["fused"])
    return marks, rows, tensors


@pytest.mark.parametrize("num_shared", [1000, 512, 100])
def test_the_marks_say_what_the_definitions_say(num_shared: int) -> None:
    marks, rows, tensors = observed(num_shared)
    best_SB = torch.stack([logits.argmax(dim=-1) for logits in tensors["logits"]])
    leaders_best = [int(best_SB[leader, row]) for row, leader in enumerate(tensors["weights"].argmax(dim=0))]
    overridden = [int(best) != own for best, own in zip(tensors["fused"].argmax(dim=-1), leaders_best, strict=True)]
    agreeing = [max(column.tolist().count(best) for best in column.tolist()) for column in best_SB.T]
    assert torch.equal(marks[:3], tensors["weights"])
    assert marks[3].tolist() == overridden
    assert marks[4].tolist() == agreeing
    assert agreeing[2:4] == [3, 2]
    assert 0 < sum(overridden) < 5
    assert rows is None


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("changes", "culprits"),
    [({"logits": (1, 3)}, 2), ({"hidden": (2, 3)}, 4), ({"weights": (0, 3)}, 8)],
    ids=["logits", "hidden", "gate"],
)
def test_a_row_that_is_not_finite_is_blamed_on_who_made_it(
    value: float, changes: dict[str, tuple[int, int]], culprits: int
) -> None:
    marks, rows, tensors = observed(changes=changes, value=value)
    assert rows is not None
    assert rows.tolist() == [False, False, False, True, False]
    assert marks[5].tolist() == [0, 0, 0, culprits, 0]
    others = [0, 1, 2, 4]
    assert torch.equal(marks[:, others], observed()[0][:, others])
    before = tensors["fused"].clone()
    neutralize(tensors["fused"], rows)
    assert torch.equal(tensors["fused"][others], before[others])
    assert torch.equal(tensors["fused"][3], torch.zeros(1000))
