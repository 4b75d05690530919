"""HumanEval (Chen et al. 2021) in instruction form, and MBPP (Austin et al. 2021). pass@1 by running the tests."""

from collections.abc import Sequence
from functools import partial

from ultrafuser.gating.evaluation.benchmarks.items import Answer, Benchmark, HubSource, Item, Row, Verdict
from ultrafuser.gating.evaluation.sandbox.programs import called_names, complete, extract_code
from ultrafuser.gating.evaluation.sandbox.sandbox import run_tests

_HUMANEVAL_PROMPT = (
    "Complete the following Python function. Return the whole function in a Markdown code block.\n\n"
    "```python\n{code}\n```"
)
_MBPP_PROMPT = (
    "{task}\nYour code should pass these tests:\n\n```python\n{tests}\n```\n\nReturn it in a Markdown code block."
)


def _read_humaneval(row: Row, chain_of_thought: bool) -> Item:
    id, code = row.identity("task_id"), row.text("prompt")
    reference = {"prompt": code, "entry_point": row.text("entry_point"), "test": row.text("test")}
    return Item.asked_once(id, _HUMANEVAL_PROMPT.format(code=code.strip()), reference)


def _read_mbpp(row: Row, chain_of_thought: bool) -> Item:
    id, tests = row.identity("task_id"), row.texts("test_list")
    prompt = _MBPP_PROMPT.format(task=row.text("text").strip(), tests="\n".join(tests))
    return Item.asked_once(id, prompt, {"setup": row.text("test_setup_code", may_be_empty=True), "tests": tests})


def _judge_humaneval(item: Item, answers: Sequence[Answer]) -> Verdict:
    entry_point = item.reference["entry_point"]
    program = complete(item.reference["prompt"], entry_point, answers[0].texts[-1])
    return _verdict(item, run_tests(program, f"{item.reference['test']}\ncheck({entry_point})\n"))


def _judge_mbpp(item: Item, answers: Sequence[Answer]) -> Verdict:
    tests = item.reference["tests"]
    program = extract_code(answers[0].texts[-1], called_names(tests))
    return _verdict(item, run_tests(program, "\n".join([item.reference["setup"], *tests, ""])))


def _verdict(item: Item, failure: str | None) -> Verdict:
    return Verdict(item.id, float(failure is None), detail=failure)


_executed = partial(Benchmark, metric="pass@1", executes_code=True)

HUMANEVAL = _executed(
    name="humaneval",
    prompts=(_HUMANEVAL_PROMPT,),
    hub=HubSource("openai/openai_humaneval", "test"),
    read=_read_humaneval,
    judge=_judge_humaneval,
)

MBPP = _executed(
    name="mbpp",
    prompts=(_MBPP_PROMPT,),
    hub=HubSource("google-research-datasets/mbpp", "test", config="full"),
    read=_read_mbpp,
    judge=_judge_mbpp,
)
