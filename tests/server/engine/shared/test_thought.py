"""Where a thought begins and ends, token by token."""

import pytest

from ultrafuser.server.engine.shared.thought import Opening, Thought, ThoughtReader

START, END, CALL = 90, 91, 92


@pytest.mark.parametrize(
    ("opening", "token_ids", "num_thought", "num_counted"),
    [
        ("open", [], 0, 0),
        ("open", [1, 2], 2, 2),
        ("open", [1, 2, END, 3], 3, 2),
        ("open", [START, 1, END, 3], 3, 1),
        ("open", [1, START, END, 3], 3, 2),
        ("open", [END, 3], 1, 0),
        ("open", [1, CALL, 3, END], 1, 1),
        ("open", [1, END, START, 3, END], 2, 1),
        ("unopened", [1, END, 3], 0, 0),
        ("unopened", [START, 1, END, 3], 3, 1),
        ("unopened", [1, START, 2, END], 0, 0),
        ("unopened", [START, CALL], 1, 0),
        ("closed", [START, 1, END, 3], 0, 0),
    ],
)
def test_a_thought_is_at_the_start_and_ends_once(
    opening: Opening, token_ids: list[int], num_thought: int, num_counted: int
) -> None:
    thought = Thought(opening, START, END, (CALL,))
    reader = ThoughtReader(thought)
    is_thought = [reader.read(token_id) for token_id in token_ids]
    assert is_thought == [True] * num_thought + [False] * (len(token_ids) - num_thought)
    assert reader.num_thought == num_counted
