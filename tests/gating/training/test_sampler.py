"""The balanced sampler: counts, epochs, seeds, resumption, processes."""

from collections import Counter
from typing import Any

import pytest

from ultrafuser.gating.errors import SamplerError
from ultrafuser.gating.training.sampler import BalancedBatches, ProportionalBatches

DOMAINS = {"text": list(range(0, 7)), "code": list(range(100, 103)), "math": list(range(200, 220))}


def batches(**changes: Any) -> BalancedBatches:
    options: dict[str, Any] = {"rows_per_domain": 4, "micro_rows_per_domain": 4, "num_steps": 9, "seed": 0}
    return BalancedBatches(DOMAINS, **(options | changes))


def pooled(**changes: Any) -> ProportionalBatches:
    options: dict[str, Any] = {"rows_per_domain": 4, "micro_rows_per_domain": 4, "num_steps": 9, "seed": 0}
    return ProportionalBatches(DOMAINS, **(options | changes))


def test_every_batch_holds_the_same_number_of_rows_of_every_domain():
    drawn = list(batches())
    assert len(drawn) == len(batches()) == 9
    for batch in drawn:
        assert Counter(row // 100 for row in batch) == {0: 4, 1: 4, 2: 4}


def test_every_domain_is_seen_whole_before_any_of_its_rows_comes_again():
    drawn = [row for batch in batches() for row in batch]
    for rows in DOMAINS.values():
        own = [row for row in drawn if row in rows]
        for begin in range(0, len(own) - len(rows) + 1, len(rows)):
            assert sorted(own[begin : begin + len(rows)]) == rows


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    own = [row for batch in batches(num_steps=35) for row in batch if row >= 200]
    epochs = [own[begin : begin + 20] for begin in range(0, 140, 20)]
    assert len({tuple(epoch) for epoch in epochs}) == 7
    assert list(batches()) == list(batches())
    assert list(batches()) != list(batches(seed=1))


def test_a_run_resumes_by_counting():
    whole = list(batches())
    assert [batches().micro_batch(number) for number in range(5, 9)] == whole[5:]
    assert list(batches(num_steps=5)) == whole[:5]


@pytest.mark.parametrize(("num_processes", "micro_rows"), [(2, 2), (2, 1), (1, 1), (4, 1)])
def test_processes_and_micro_batches_share_a_steps_rows_without_overlap(num_processes, micro_rows):
    split = [
        batches(micro_rows_per_domain=micro_rows, rank=rank, num_processes=num_processes)
        for rank in range(num_processes)
    ]
    per_step = split[0].micro_batches_per_step
    assert per_step * micro_rows * num_processes == 4
    for step, whole in enumerate(batches()):
        shared = [row for own in split for micro in range(per_step) for row in own.micro_batch(step * per_step + micro)]
        assert sorted(shared) == sorted(whole)
    assert all(
        Counter(row // 100 for row in own.micro_batch(3)) == dict.fromkeys(range(3), micro_rows) for own in split
    )


def test_epochs_are_counted_per_domain():
    assert batches().epochs(7) == {"text": 4.0, "code": 28 / 3, "math": 1.4}


def test_rows_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(SamplerError, match=r"4 rows of a step cannot be shared by 3 processes .* use a multiple of 3"):
        batches(micro_rows_per_domain=1, num_processes=3)


def test_a_domain_without_rows_is_refused():
    with pytest.raises(SamplerError, match="domain 'law': has no rows"):
        BalancedBatches({"law": []}, rows_per_domain=1, micro_rows_per_domain=1, num_steps=1, seed=0)


def test_proportional_batches_are_as_large_and_see_the_union_whole_before_any_row_comes_again():
    drawn = [row for batch in pooled(num_steps=10) for row in batch]
    assert {len(batch) for batch in pooled()} == {12}
    union = sorted(row for rows in DOMAINS.values() for row in rows)
    for begin in range(0, 120 - 30 + 1, 30):
        assert sorted(drawn[begin : begin + 30]) == union
    assert drawn[:30] != drawn[30:60]


def test_proportional_batches_mix_the_domains_by_their_sizes():
    counts = Counter(row // 100 for batch in pooled(num_steps=5) for row in batch)
    assert counts == {0: 2 * 7, 1: 2 * 3, 2: 2 * 20}, "two epochs"
    assert any(Counter(row // 100 for row in batch) != {0: 4, 1: 4, 2: 4} for batch in pooled())


@pytest.mark.parametrize(("num_processes", "micro_rows"), [(2, 2), (2, 1), (1, 1), (4, 1)])
def test_processes_share_a_proportional_step_too_and_a_run_resumes_by_counting(num_processes, micro_rows):
    split = [
        pooled(micro_rows_per_domain=micro_rows, rank=rank, num_processes=num_processes)
        for rank in range(num_processes)
    ]
    per_step = split[0].micro_batches_per_step
    assert {len(own.micro_batch(5)) for own in split} == {3 * micro_rows}
    for step, whole in enumerate(pooled()):
        shared = [row for own in split for micro in range(per_step) for row in own.micro_batch(step * per_step + micro)]
        assert sorted(shared) == sorted(whole)
    assert [pooled().micro_batch(number) for number in range(5, 9)] == list(pooled())[5:]


def test_proportional_epochs_are_those_of_the_union_for_every_domain():
    assert pooled().epochs(5) == {"text": 2.0, "code": 2.0, "math": 2.0}


def test_proportional_rows_that_cannot_be_shared_are_refused_in_the_users_numbers():
    with pytest.raises(SamplerError, match=r"4 rows of a step cannot be shared by 3 processes .* use a multiple of 3"):
        pooled(micro_rows_per_domain=1, num_processes=3)
