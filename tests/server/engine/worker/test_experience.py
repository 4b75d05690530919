"""What passes cost and how often drafts are right, from those that were."""

import pytest

from ultrafuser.server.engine.worker.experience import Cost, Experience


def test_a_cost_follows_rows_and_forgives_an_outlier() -> None:
    cost = Cost()
    for _ in range(50):
        for num_rows in (1, 2, 5):
            cost.add(num_rows, 2.0 + 0.5 * num_rows)
    assert cost.of(9) == pytest.approx(6.5, rel=0.05)
    cost.add(5, 1000.0)
    assert cost.of(9) < 8


def test_requests_that_have_ended_are_forgotten() -> None:
    experience = Experience()
    for name in "ab":
        experience.add(name, 0, 0, 4, 4)
    experience.forget_all_but(["b"])
    assert {request for request, _ in experience._of_requests} == {"b"}
