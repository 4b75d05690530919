"""10,000 items from a server that fails in every way a server can: nothing is lost, nothing is made twice."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.gating.evaluation.endpoint import Reply
from tests.gating.synthesis.model import answer, serving_model
from tests.gating.synthesis.runs import misses_of, records_of, run, settings_of

FAULT_SHARE = 0.06
TIMEOUT_SECONDS = 3.0
HANG_SECONDS = 8.0


class Faults:
    """Breaks a share of the calls; a second try of the same call is drawn anew."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._source = random.Random(0)

    def __call__(self, body: dict[str, Any], before: int) -> Reply | None:
        if self._source.random() > FAULT_SHARE:
            return None
        kinds = ["429", "500", "503", "hang", "reset", "cut", "no JSON", "half an answer", "empty"]
        kind = self._source.choices(kinds, weights=[5, 5, 3, 0.3, 3, 3, 3, 5, 2])[0]
        self.counts[kind] += 1
        return {
            "429": Reply("slow down", status=429, headers={"Retry-After": "0.05"}),
            "500": Reply("oops", status=500),
            "503": Reply("busy", status=503),
            "hang": Reply("late", wait_seconds=HANG_SECONDS),
            "reset": Reply(resets=True),
            "cut": Reply(answer(body).text, is_cut=True),
            "no JSON": Reply(raw=b"<html>gateway</html>"),
            "half an answer": Reply(answer(body).text[:30] if "response_format" in body else "", status=200),
            "empty": Reply(raw=b'{"choices": []}'),
        }[kind]


@pytest.mark.long
def test_10_000_items_come_out_of_a_faulty_server_once_each(tmp_path: Path) -> None:
    plan: dict[str, Any] = {
        "domain": ("text", "code", "math"),
        "meta_topics": 4,
        "sub_topics": 5,
        "instructions": 10,
        "strong": 4,
        "weak": 4,
        "complex_share": 0.05,
        "turns": 1,
        "turn_share": 0.05,
        "timeout_seconds": TIMEOUT_SECONDS,
        "concurrency": 64,
    }
    faults = Faults()
    with serving_model(faults) as endpoint:
        ending = run(settings_of(tmp_path, endpoint, **plan))
    num_instructions = 3 * 4 * 5 * 10 * 9
    records = records_of(tmp_path)
    stages = Counter(record.stage for record in records.values())
    items = [item.id for record in records.values() for item in record.items]
    missed = misses_of(tmp_path)
    assert len(items) == len(set(items))
    assert len(items) >= 10_000
    assert min(faults.counts.values()) >= 1
    assert len(faults.counts) == 9
    # Half an answer, where text is asked for, is an empty response: rejected. All else was asked again until it came.
    assert set(missed) <= {"too_short", "unparsable"}
    assert ending.num_failed == 0
    assert stages["instructions"] == 3 * 4 * 5
    assert stages["related"] + _missed(tmp_path, "related") == 3 * 4 * 5 * 10
    assert stages["responses"] + _missed(tmp_path, "responses") == num_instructions - 8 * _missed(tmp_path, "related")
    assert stages["responses_1"] + _missed(tmp_path, "responses_1") == stages["user_turns_1"]


def _missed(folder: Path, stage: str) -> int:
    lines = (folder / "misses.jsonl").read_text().splitlines()
    return sum(f'"stage":"{stage}"' in line for line in lines)
