"""Each benchmark's own arithmetic: which number is divided by which, and what a missing side does."""

import pytest

from benchmarks import (
    batch_invariance,
    decode_step,
    gate_kinds,
    metrics_cost,
    peers_servers,
    peers_transformers,
    prefill,
    serve_overhead,
    speculation,
)
from benchmarks.stepping import Round
from benchmarks.workload import conversations, random_requests
from ultrafuser.gating.model.fusion import FusedModelInfo

INFO = FusedModelInfo(hidden_sizes=(8, 8, 8), vocab_sizes=(300, 310, 305), num_shared_ids=300, max_model_len=512)


def test_a_fused_step_of_three_single_steps_has_ratio_one() -> None:
    rounds = [Round(fused=[0.03, 0.09, 0.03], baseline=[0.01, 0.01, 0.01])]
    comparison = decode_step.compare(8, rounds, num_specialists=3)
    assert comparison.ratio == pytest.approx(1.0)
    assert comparison.baseline is not None
    assert comparison.baseline.value == pytest.approx(30.0)
    assert comparison.is_met


def test_metrics_may_cost_two_hundredths() -> None:
    assert metrics_cost.compare(8, [Round([0.0509], [0.05])] * 3).is_met
    assert metrics_cost.compare(8, [Round([0.0515], [0.05])] * 3).is_met is False


def test_a_kind_of_gate_may_cost_two_hundredths() -> None:
    assert gate_kinds.compare("joint", 8, [Round([0.0509], [0.05])] * 3).is_met
    assert gate_kinds.compare("joint", 8, [Round([0.0515], [0.05])] * 3).is_met is False


def test_a_decode_step_that_fuses_dearly_misses_its_bar() -> None:
    assert decode_step.compare(1, [Round([0.034], [0.01])], num_specialists=3).is_met is False


def test_one_side_alone_has_no_ratio() -> None:
    comparison = decode_step.compare(1, [Round(fused=[0.03])], num_specialists=3)
    assert comparison.ratio is None
    assert comparison.baseline is None
    assert peers_transformers.compare_steps(1, [Round(baseline=[0.1])]).ratio is None


@pytest.mark.parametrize(("batch", "bar"), [(1, 1.8), (8, 1.6), (32, 1.4)])
def test_a_transformers_step_counts_as_a_multiple_of_ours(batch: int, bar: float) -> None:
    comparison = peers_transformers.compare_steps(batch, [Round([0.05], [0.05 * bar * 1.01])] * 3)
    assert comparison.ratio == pytest.approx(bar * 1.01)
    assert comparison.is_met
    assert peers_transformers.compare_steps(batch, [Round([0.05], [0.05 * bar * 0.99])]).is_met is False


def test_mixed_servers_must_be_ten_times_slower() -> None:
    sizes = peers_servers.Sizes()
    assert peers_servers.compare(sizes, fused=[99.0, 100.0, 101.0], mixed=[10.0]).is_met
    assert peers_servers.compare(sizes, fused=[99.0], mixed=[10.0]).is_met is False


def test_the_time_between_tokens_is_taken_per_stream() -> None:
    http, engine = serve_overhead.Turns(), serve_overhead.Turns()
    http.add([[0.0, 1.1, 2.2], [5.0, 6.1, 7.2]], num_tokens=3)
    engine.add([[0.0, 1.0, 2.0]], num_tokens=3)
    comparison = serve_overhead.compare(2, http, engine)
    assert comparison.ratio == pytest.approx(1.1)
    assert comparison.fused is not None
    assert comparison.fused.num_samples == 4
    assert comparison.fused.value == pytest.approx(1100.0)


def test_two_tokens_in_one_chunk_do_not_make_a_stream_look_slower() -> None:
    turns = serve_overhead.Turns()
    turns.add([[0.0, 2.0, 3.0]], num_tokens=4)
    assert turns.seconds_per_token == [1.0]


def test_unequal_requests_span_the_range_and_are_the_same_each_time() -> None:
    sizes = peers_transformers.Sizes()
    requests = peers_transformers.unequal_requests(INFO, sizes)
    lengths = [request.num_tokens for request in requests]
    assert (min(lengths), max(lengths), len(lengths)) == (8, 256, 128)
    assert lengths != sorted(lengths)
    assert requests == peers_transformers.unequal_requests(INFO, sizes)


def test_random_requests_have_own_prompts_of_equal_length_for_each_specialist() -> None:
    (request,) = random_requests(INFO, [12], [5], seed=0)
    assert [len(prompt) for prompt in request.prompts] == [12, 12, 12]
    assert request.prompts[0] != request.prompts[1]


def test_conversations_differ() -> None:
    texts = [messages[0]["content"] for messages in conversations(32)]
    assert len(set(texts)) == 32


def test_shares_of_equal_responses_and_tokens() -> None:
    alone, together = [[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]
    assert batch_invariance.equal_share(alone, together) == 0.5
    assert batch_invariance.equal_token_share(alone, together) == pytest.approx(4 / 6)


def test_a_response_that_only_ends_earlier_is_not_equal() -> None:
    assert batch_invariance.equal_share([[1, 2, 3]], [[1, 2]]) == 0.0
    assert batch_invariance.equal_token_share([[1, 2, 3]], [[1, 2]]) == pytest.approx(2 / 3)


def test_a_share_of_nothing_equal_gives_no_ratio() -> None:
    fused, plain = ([[1]], [[1]]), ([[1]], [[2]])
    first = batch_invariance.compare(fused, plain, 1)[0]
    assert first.ratio is None
    assert first.fused is not None
    assert first.fused.value == 1.0


def test_a_long_prompt_may_come_fifteen_hundredths_later_and_gaps_are_not_judged() -> None:
    bounded = prefill.Turns(gaps=[0.9, 1.0, 0.8], longest=[1.0], first_tokens=[[22.0]])
    whole = prefill.Turns(gaps=[20.0], longest=[20.0], first_tokens=[[20.0]])
    case = prefill.Case("beside 4 streams", num_streams=4, num_prompts=1)
    gap, longest, first = prefill.compare(case, bounded, whole)
    assert (gap.ratio, longest.ratio, first.ratio) == pytest.approx((0.9 / 20, 1 / 20, 1.1))
    assert (gap.is_met, longest.is_met, first.is_met) == (None, None, True)
    late = prefill.Turns(gaps=[1.0], longest=[1.0], first_tokens=[[23.5]])
    assert prefill.compare(case, late, whole)[-1].is_met is False


def test_prompts_without_streams_have_first_tokens_only() -> None:
    turns = prefill.Turns(gaps=[1.0, 1.0], longest=[1.0], first_tokens=[[1.0, 2.0]])
    first, second = prefill.compare(prefill.Case("two", 0, 2), turns, prefill.Turns())
    assert first.fused is not None
    assert second.fused is not None
    assert (first.fused.value, second.fused.value, first.ratio) == (1.0, 2.0, None)


def test_drafts_are_judged_by_pairs_of_blocks_and_by_one_model() -> None:
    def block(seconds: float, num_drafts: int = 0) -> speculation.Block:
        return speculation.Block([list(range(16)), list(range(16))], 10, num_drafts, seconds)

    races = [
        {"drafts": block(drafts, num_drafts=25), "without": block(without), "one model": block(drafts / 2)}
        for drafts, without in ((1.0, 2.0), (2.0, 4.0), (1.0, 1.0))
    ]
    gain = speculation.compare_rates("text", races, speculation.GAIN_OF_ONE)
    assert (gain.ratio, gain.is_met) == (2.0, True)
    assert gain.note == "3.00 tokens a round, 0.80 of the drafts accepted, 6 of 6 answers equal"
    against_one = speculation.compare_times("text", races)
    assert (against_one.ratio, against_one.is_met) == (2.0, True)
    alone = [{"drafts": race["drafts"]} for race in races]
    assert speculation.compare_rates("text", alone, speculation.NO_LOSS).ratio is None
