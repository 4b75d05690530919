"""A dry run counts the calls that a run makes, and learns their tokens from those that are made."""

import pytest

from tests.gating.synthesis.model import serving_model
from tests.gating.synthesis.runs import run, settings_of
from ultrafuser.gating.synthesis.calls.estimate import estimate
from ultrafuser.gating.synthesis.settings import MakeSettings
from ultrafuser.gating.synthesis.stages.store import Store
from ultrafuser.server.__main__ import main


def test_the_calls_are_those_that_a_run_makes(tmp_path):
    settings = settings_of(tmp_path, instructions=11, turns=2)
    with serving_model() as endpoint:
        run(settings_of(tmp_path, endpoint, instructions=11, turns=2))
    estimates = {item.stage: item.calls for item in estimate(settings.structure(), None)}
    with Store(tmp_path) as store:
        made = {stage: len(store.ids(stage)) for stage in estimates}
    drawn = {"complications", "user_turns_1", "responses_1", "user_turns_2", "responses_2"}
    assert {name: made[name] for name in made.keys() - drawn} == {
        name: estimates[name] for name in estimates.keys() - drawn
    }
    for stage in drawn:
        assert estimates[stage] == pytest.approx(made[stage], rel=0.25)


def test_what_is_made_is_measured_and_what_is_missing_is_scaled_from_it(tmp_path):
    with serving_model() as endpoint:
        whole = run(settings_of(tmp_path, endpoint, strong=0, weak=0, complex_share=0.0))
    structure = settings_of(tmp_path, strong=0, weak=0, complex_share=0.0).structure()
    with Store(tmp_path) as store:
        finished = estimate(structure, store)
        assert sum(item.prompt_tokens + item.completion_tokens for item in finished) == 0
        assert all(item.is_measured for item in finished if item.calls)
        store.ids("responses").clear()  # as if none of them had been made yet
        (responses,) = [item for item in estimate(structure, store) if item.stage == "responses"]
    prompts = sum(len(body["messages"][0]["content"]) for body in endpoint.asked)
    assert prompts > 0
    assert responses.calls == 16
    assert responses.completion_tokens == pytest.approx(responses.calls * 70, rel=0.2)
    assert whole.report["completion_tokens"] > responses.completion_tokens


def test_the_papers_size_is_300_000_conversations():
    structure = MakeSettings(output="x", domain=("text", "code", "math")).structure()
    calls = {item.stage: item.calls for item in estimate(structure, None)}
    assert calls["responses"] == 309_690
    assert calls["complications"] == pytest.approx(0.3 * 309_690, abs=2)
    assert calls["related"] == 309_690 / 5


def test_a_dry_run_prints_a_table_and_asks_nobody(tmp_path, capsys):
    argv = ["data", "make", str(tmp_path / "none"), "--domain", "text", "code", "math", "--dry-run"]
    prices = ["--prompt-price", "1", "--completion-price", "4"]
    assert main([*argv, *prices]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "stage", "meta_topics", "sub_topics", "instructions", "related", "complications", "responses", "all"
    ]  # fmt: skip
    cells = [line.replace(",", "").split() for line in lines[1:]]
    costs = [float(row[5]) for row in cells]
    assert costs[-1] == pytest.approx(sum(costs[:-1]), abs=0.05)
    assert costs[-1] == pytest.approx((int(cells[-1][3]) + 4 * int(cells[-1][4])) / 1e6, abs=0.01)
    assert not (tmp_path / "none").exists()
