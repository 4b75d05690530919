"""What followed the last tokens before: the longest match, the last place, and only ids that all specialists share."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ultrafuser.server.engine.worker.drafting import NgramDrafter

NUM_SHARED_IDS = 100


def look_up(text: list[int], num_tokens: int = 4) -> tuple[int, list[int]]:
    """What is found for a request whose prompt and response are this."""
    batch = SimpleNamespace(
        req_id_to_index={"a": 0},
        token_ids_cpu=np.array([[*text, 7, 7, 7]], dtype=np.int32),  # rows are longer than what is in them
        num_tokens_no_spec=np.array([len(text)]),
    )
    leader: Any = SimpleNamespace(input_batch=batch)
    return NgramDrafter(leader, NUM_SHARED_IDS).look_up("a", num_tokens)


@pytest.mark.parametrize(
    ("text", "num_matched", "followers"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 2, [3, 4, 5, 1]),
        ([1, 2, 3, 9, 2, 3, 8, 2, 3], 2, [8, 2, 3]),  # the last place of two
        ([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3], 3, [9, 5, 2, 3]),  # an earlier place where more is the same
        ([4, 4, 4, 4], 3, [4]),  # it may overlap the end
        ([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7], 5, [8, 1, 2, 3]),  # no more than five are compared
        ([1, 2, 3], 0, []),
        ([1, 2, 1], 0, []),  # one token is no match
        ([1], 0, []),
        ([1, 2, 100, 5, 1, 2], 2, []),  # an id that not all specialists have
        ([1, 2, 3, 100, 5, 1, 2], 2, [3]),
    ],
)
def test_what_followed_is_found(text: list[int], num_matched: int, followers: list[int]) -> None:
    assert look_up(text) == (num_matched, followers)


def test_no_more_is_taken_than_asked_for() -> None:
    assert look_up([1, 2, 3, 4, 5, 1, 2], num_tokens=1) == (2, [3])
