"""Numbers of a gate: means over tokens, leads, entropy, their intervals and their tables."""

import json
import math

import pytest

from tests.gating.analysis.readings import reading_of
from ultrafuser.gating.analysis.tables import as_json, as_markdown
from ultrafuser.gating.analysis.weights import summarize

NAMES = ("text", "code")


def test_means_are_over_tokens_not_over_conversations():
    reading = reading_of([("text", [[0.9, 0.1]]), ("text", [[0.3, 0.7]] * 3)], NAMES)
    (summary,) = summarize(reading).values()
    assert summary.weights["text"].mean == pytest.approx((0.9 + 3 * 0.3) / 4)
    assert summary.leads["text"].mean == pytest.approx(1 / 4)
    assert (summary.num_conversations, summary.num_tokens) == (2, 4)
    assert reading.conversation_means()[0] == pytest.approx([0.9, 0.3])


def test_entropy_is_zero_for_a_closed_gate_and_one_specialist_counts():
    (summary,) = summarize(reading_of([("text", [[1.0, 0.0]] * 2)], NAMES)).values()
    assert summary.entropy.mean == 0
    assert summary.num_effective.mean == 1


def test_entropy_of_equal_weights_counts_all_specialists():
    (summary,) = summarize(reading_of([("text", [[0.25] * 4] * 2)], "abcd")).values()
    assert summary.entropy.mean == pytest.approx(math.log(4))
    assert summary.num_effective.mean == pytest.approx(4)
    assert summary.leads["a"].mean == 1, "the first of equals leads"


def test_intervals_reach_over_the_conversations_and_move_with_no_other_domain():
    # Two conversations of equal length: a resample's mean is one of the two or their middle, each extreme 1 in 4.
    pair = [("text", [[0.9, 0.1]] * 5), ("text", [[0.5, 0.5]] * 5)]
    (alone,) = summarize(reading_of(pair, NAMES)).values()
    assert alone.weights["text"].interval == pytest.approx((0.5, 0.9))
    assert alone.weights["text"].mean == pytest.approx(0.7)
    both = summarize(reading_of([*pair, ("code", [[0.2, 0.8]]), ("code", [[0.2, 0.8]] * 4)], NAMES))
    assert both["text"] == alone
    assert both["code"].weights["code"].interval == pytest.approx((0.8, 0.8)), "conversations that are alike"
    assert alone.entropy.interval is not None
    low, high = alone.entropy.interval
    assert alone.num_effective.interval == pytest.approx((math.exp(low), math.exp(high)))


def test_a_single_conversation_has_no_interval():
    summaries = summarize(reading_of([("text", [[0.9, 0.1], [0.6, 0.4]])], NAMES))
    assert summaries["text"].weights["text"].interval is None
    values = as_json("tiny", summaries)["domains"]["text"]["weights"]["text"]
    assert values == {"mean": pytest.approx(0.75), "low": None, "high": None}
    assert "| text | 0.750 | 0.250 |" in as_markdown("tiny", summaries)


def test_the_tables_are_the_jsons_numbers_and_keep_odd_names_in_their_cells():
    reading = reading_of([("a|b", [[0.9, 0.1]]), ("a|b", [[0.5, 0.5]]), ("c", [[0.2, 0.8]] * 2)], NAMES)
    summaries = summarize(reading)
    content = json.loads(json.dumps(as_json("tiny", summaries)))
    assert content["fusion"] == "tiny"
    own = content["domains"]["c"]
    assert own["conversations"] == 1
    assert own["tokens"] == 2
    assert own["leads"]["code"]["mean"] == 1
    lines = as_markdown("tiny", summaries).splitlines()
    tables = [line for line in lines if line.startswith("| a\\|b")]
    assert len(tables) == 3
    assert tables[0].split(" | ")[1].strip() == "0.700 [0.500, 0.900]"
    assert len({len(line) for line in lines[6:10]}) == 1, "cells are padded"
