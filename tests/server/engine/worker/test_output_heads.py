"""What a follower with ranks of its own says that it will send."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ultrafuser.server.engine.worker.output_heads import introduce, meet

WIDTH, NUM_SHARED = 8, 20


class Ranks:
    """An exchange of a leader and one follower, both in this process."""

    def __init__(self) -> None:
        self._said: Any = None

    def share(self, own: Any = None) -> list[Any]:
        """The follower speaks first."""
        self._said = own or self._said
        return [None, self._said]


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
def test_logits_are_announced_in_the_type_that_the_model_gives(logits_dtype: torch.dtype) -> None:
    """Whatever its configuration says of the head: the leader would read others' bytes, or wait for more."""

    def compute_logits(hidden_BD: Tensor) -> Tensor:
        return hidden_BD.to(logits_dtype).repeat(1, 4)

    config = SimpleNamespace(
        get_hidden_size=lambda: WIDTH, dtype=torch.bfloat16, head_dtype=torch.bfloat16, get_vocab_size=lambda: 4 * WIDTH
    )
    runner: Any = SimpleNamespace(
        model=SimpleNamespace(compute_logits=compute_logits), model_config=config, device=torch.device("cpu")
    )
    exchange: Any = Ranks()
    introduce(runner, "code", "logits", NUM_SHARED, exchange)
    (sent,) = meet(exchange)
    assert (sent.width, sent.dtype) == (NUM_SHARED, logits_dtype)
    assert (sent.hidden_size, sent.hidden_dtype) == (WIDTH, torch.bfloat16)
    logits_BV = compute_logits(torch.zeros(3, WIDTH, dtype=torch.bfloat16))
    assert sent.logits_of(logits_BV) is logits_BV
