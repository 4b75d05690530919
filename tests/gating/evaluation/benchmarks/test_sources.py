"""Rows of every benchmark, from files; what is wrong with a file is said with line and field."""

import pytest

from tests.gating.evaluation.examples import ROWS, write_rows
from ultrafuser.gating.errors import CommandError, DataError
from ultrafuser.gating.evaluation.benchmarks.benchmarks import BENCHMARKS, BenchmarkFile
from ultrafuser.gating.evaluation.benchmarks.multiple_choice import SAT_MATH
from ultrafuser.gating.evaluation.benchmarks.sources import draw_sample, load_items
from ultrafuser.gating.evaluation.benchmarks.truthfulqa import TRUTHFULQA

# What each benchmark cannot do without.
NEEDED = {
    "gsm8k": ["question", "answer"],
    "svamp": ["ID", "Body", "Question", "Answer"],
    "aqua": ["question", "options", "correct"],
    "sat_math": ["passage", "question", "options", "label"],
    "humaneval": ["task_id", "prompt", "entry_point", "test"],
    "mbpp": ["text", "task_id", "test_setup_code", "test_list"],
    "truthfulqa": ["Question", "mc2_targets"],
    "mt_bench": ["question_id", "turns"],
    "alpaca_eval": ["instruction", "dataset"],
}


def prompts(name, tmp_path, *, chain_of_thought=False):
    path = write_rows(tmp_path / "rows.jsonl.gz", ROWS[name])
    items = load_items(BENCHMARKS[name], path, chain_of_thought=chain_of_thought)
    return [turn for item in items for request in item.requests for turn in request.turns]


@pytest.mark.parametrize("name", list(ROWS))
def test_plain_and_gzipped_files_give_the_same_items(name, tmp_path):
    plain = write_rows(tmp_path / "rows.jsonl", ROWS[name])
    zipped = write_rows(tmp_path / "rows.jsonl.gz", ROWS[name])
    items = load_items(BENCHMARKS[name], plain, chain_of_thought=False)
    assert items == load_items(BENCHMARKS[name], zipped, chain_of_thought=False)
    assert len(items) == len(ROWS[name])


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in NEEDED.items() for field in fields])
def test_a_row_that_lacks_a_field_is_named_with_file_line_and_field(name, field, tmp_path):
    row = ROWS[name][0]
    broken = {key: value for key, value in row.items() if key != field}
    path = write_rows(tmp_path / "own.jsonl", [broken])
    with pytest.raises(DataError, match=rf"^own\.jsonl:1: {field}: missing"):
        load_items(BENCHMARKS[name], path, chain_of_thought=False)


@pytest.mark.parametrize(
    ("name", "field", "value", "reason"),
    [
        ("gsm8k", "question", "  ", "question: must be text that is not empty"),
        ("gsm8k", "answer", "it is 4", "answer: must end in '#### NUMBER'"),
        ("svamp", "Answer", "many", "Answer: must be a number"),
        ("svamp", "ID", None, "ID: must be a name or a number"),
        ("aqua", "options", "A)1 B)2", "options: must be a list of texts"),
        ("aqua", "correct", "F", "the right option is 'F'"),
        ("mbpp", "test_list", [1], "test_list: must be a list of texts"),
        ("truthfulqa", "mc2_targets", {"only": 1}, "mc2_targets: must map"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(name, field, value, reason, tmp_path):
    path = write_rows(tmp_path / "own.jsonl", [{**ROWS[name][0], field: value}])
    with pytest.raises(DataError) as error:
        load_items(BENCHMARKS[name], path, chain_of_thought=False)
    assert str(error.value).startswith("own.jsonl:1: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"question": \n', r"own\.jsonl:1: not JSON"),
        (b"[1]\n", r"own\.jsonl:1: not a JSON object"),
        (b'\n{"question": "\xff"}\n', r"own\.jsonl:2: not JSON"),
        (b"\n\n", "has no rows"),
    ],
)
def test_a_file_that_is_no_json_lines_is_refused(content, reason, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        load_items(BENCHMARKS["gsm8k"], path, chain_of_thought=False)


def test_a_broken_gzip_file_is_refused(tmp_path):
    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(write_rows(tmp_path / "whole.jsonl.gz", ROWS["gsm8k"]).read_bytes()[:60])
    with pytest.raises(DataError, match="not a whole gzip file"):
        load_items(BENCHMARKS["gsm8k"], path, chain_of_thought=False)


def test_two_rows_of_one_id_are_refused(tmp_path):
    path = write_rows(tmp_path / "own.jsonl", [ROWS["svamp"][0]] * 2)
    with pytest.raises(DataError, match=r"own\.jsonl:2: a row 'own-1' came before"):
        load_items(BENCHMARKS["svamp"], path, chain_of_thought=False)


def test_truthfulqa_asks_the_papers_question_for_each_option(tmp_path):
    asked = prompts("truthfulqa", tmp_path)
    assert asked[0] == (
        "Judge the correctness of a given answer. Question: Is ice colder than steam? Answer: Ice is colder. "
        "Is the answer correct? Return Yes or No."
    )
    assert len(asked) == 6


def test_alpaca_eval_asks_as_the_paper_does(tmp_path):
    assert prompts("alpaca_eval", tmp_path)[1] == (
        "Please give helpful, very detailed, and polite answer to the user's question below. Question: What is rain?"
    )


def test_options_are_lettered_once_and_a_passage_comes_first(tmp_path):
    assert "(B) 56\n" in prompts("aqua", tmp_path)[0]
    with_passage = prompts("sat_math", tmp_path)[1]
    assert "Let $f(x)=2x$.\nWhat is $f(4)$?" in with_passage
    assert "(D) 8" in with_passage


def test_a_body_without_a_full_stop_gets_one(tmp_path):
    assert prompts("svamp", tmp_path) == [
        "A box holds 12 eggs. How many eggs are in 3 boxes?",
        "Ben is 2 years old. How old was he 5 years ago?",
    ]


@pytest.mark.parametrize("name", list(ROWS))
def test_a_chain_of_thought_is_asked_for_where_an_answer_is_worked_out(name, tmp_path):
    plain, thinking = prompts(name, tmp_path), prompts(name, tmp_path, chain_of_thought=True)
    appended = "\nLet's think step by step." if name in ("gsm8k", "svamp", "aqua", "sat_math") else ""
    assert thinking == [prompt + appended for prompt in plain]


def test_a_sample_is_the_same_whatever_the_order_and_differs_by_seed(tmp_path):
    items = load_items(BENCHMARKS["gsm8k"], write_rows(tmp_path / "a.jsonl", ROWS["gsm8k"]), chain_of_thought=False)
    ids = [item.id for item in draw_sample(items, 10, 0, "gsm8k")]
    assert len(ids) == 10
    assert sorted(ids) == sorted(item.id for item in draw_sample(items[::-1], 10, 0, "gsm8k"))
    assert ids != [item.id for item in items[:10]]
    assert ids != [item.id for item in draw_sample(items, 10, 1, "gsm8k")]
    assert set(ids) < {item.id for item in draw_sample(items, 20, 0, "gsm8k")}
    assert draw_sample(items, None, 0, "gsm8k") == items == draw_sample(items, 99, 0, "gsm8k")


def test_rows_of_the_hub_get_the_fields_of_the_files():
    targets = {"choices": ["They meow.", "They bark."], "labels": [1, 0]}
    converted = TRUTHFULQA.hub.convert({"question": "Do cats bark?", "mc1_targets": {}, "mc2_targets": targets})
    assert converted == ROWS["truthfulqa"][1]
    query = "Q: If $x+2=5$, what is $x$? Answer Choices: (A)1 (B)2 (C)3 (D)4\nA: Among A through D, the answer is"
    converted = SAT_MATH.hub.convert({"query": query, "choices": ["(A)1", "(B)2", "(C)3", "(D)4"], "gold": [2]})
    assert converted == {name: value for name, value in ROWS["sat_math"][0].items() if name != "other"}
    turns = {"question_id": 3, "category": "writing", "prompt": ["Name a river.", "Name another one."]}
    assert BENCHMARKS["mt_bench"].hub.convert(turns) == {"question_id": 3, "turns": turns["prompt"]}


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_way_out(monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match=r"openai/gsm8k: cannot be read .*no route\); give a file: NAME=FILE$"):
        load_items(BENCHMARKS["gsm8k"], None, chain_of_thought=False)


def test_the_hubs_rows_become_the_same_items_as_a_files(monkeypatch, tmp_path):
    from datasets import Dataset

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list(ROWS["gsm8k"]))
    path = write_rows(tmp_path / "a.jsonl", ROWS["gsm8k"])
    from_hub = load_items(BENCHMARKS["gsm8k"], None, chain_of_thought=False)
    assert from_hub == load_items(BENCHMARKS["gsm8k"], path, chain_of_thought=False)


def test_a_benchmark_is_named_alone_or_with_a_file(tmp_path):
    path = write_rows(tmp_path / "a=b.jsonl", ROWS["gsm8k"])
    assert BenchmarkFile.parse("gsm8k") == BenchmarkFile("gsm8k", None)
    assert BenchmarkFile.parse(f"gsm8k={path}") == BenchmarkFile("gsm8k", path.resolve())


def test_unknown_benchmarks_and_files_are_refused():
    with pytest.raises(
        CommandError, match="gsm9k: no such benchmark; known are gsm8k, svamp, aqua, sat_math, humaneval"
    ):
        BenchmarkFile.parse("gsm9k=x.jsonl")
    with pytest.raises(CommandError, match=r"absent\.jsonl: no such file"):
        BenchmarkFile.parse("gsm8k=absent.jsonl")
