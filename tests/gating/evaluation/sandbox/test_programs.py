"""Programs out of answers, in the forms in which models give them; each is run."""

import pytest

from ultrafuser.gating.evaluation.sandbox.programs import called_names, complete, defines, extract_code
from ultrafuser.gating.evaluation.sandbox.sandbox import run_tests

PROMPT = 'import math\n\ndef triple(x):\n    return 3 * x\n\ndef area(r):\n    """ Thrice the square of r. """\n'
TESTS = "assert area(2) == 12\nassert area(0) == 0\n"

WHOLE = "def area(r):\n    if r == 0:\n        return 0\n    return triple(r) * math.floor(r)\n"
BODY = "    if r == 0:\n        return 0\n    return triple(r) * math.floor(r)\n"


@pytest.mark.parametrize(
    "answer",
    [
        WHOLE,
        BODY,
        BODY.lstrip(),
        "if r == 0:\n    return 0\nreturn triple(r) * r\n",
        "return triple(r) * r",
        f"```python\n{WHOLE}```",
        f"```\n{BODY}```",
        f"Sure:\n\n```py\n{WHOLE}\n```\nCall it so:\n```python\nprint(area(input()))\n```",
        f"First an example:\n```python\nx = 3\n```\nThe function:\n```python\n{WHOLE}```",
        f"```python\n{WHOLE}",
        f"1. The code:\n\n   ```python\n{''.join(f'   {line}' for line in WHOLE.splitlines(keepends=True))}   ```",
        f"Here is the function:\n\n{WHOLE}\nIt takes r and returns the area.",
        f"```python\n{PROMPT}{BODY}```",
        "import math\n    return triple(r) * math.floor(r)",
    ],
)
def test_a_function_is_completed_from_many_forms_of_answer(answer):
    assert run_tests(complete(PROMPT, "area", answer), TESTS) is None


@pytest.mark.parametrize(
    "answer", ["", "I cannot do this.", "```python\n```", "    return r\n", "def area(r):\n    return r\n"]
)
def test_an_answer_without_the_right_function_fails(answer):
    assert run_tests(complete(PROMPT, "area", answer), TESTS) is not None


def test_of_several_blocks_the_one_that_defines_the_function_is_taken():
    text = "```\npip install x\n```\n```python\ndef other(): pass\n```\n```python\ndef wanted(): pass\n```"
    assert extract_code(text, ["wanted"]) == "def wanted(): pass"
    assert extract_code(text, ["absent"]) == "pip install x"


def test_code_without_a_fence_ends_where_python_ends():
    text = "The solution:\nfrom math import pi\ndef f():\n    return pi\nHope that helps!"
    assert extract_code(text, ["f"]) == "from math import pi\ndef f():\n    return pi"


def test_a_name_that_is_only_called_or_only_begins_alike_is_not_defined():
    assert defines("def f(x):\n    return x", "f")
    assert defines("f = lambda x: x", "f")
    assert not defines("f(3)", "f")
    assert not defines("def f2(x):\n    return x", "f")
    assert not defines("    def f(self):\n        return 1", "f")


def test_the_names_that_tests_call_are_found_in_order():
    assert called_names(["assert set(alike((3, 4))) == set((4,))", "assert alike(()) == ()"]) == ["set", "alike"]
