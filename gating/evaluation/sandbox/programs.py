"""Programs out of answers: the code in Markdown fences or in bare text, joined with what a problem gives.

Knows Python's syntax. Runs nothing.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Sequence

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_CODE_BEGIN = re.compile(r"^(?:def |async def |class |import |from \w[\w.]* import |@)", re.MULTILINE)


def extract_code(text: str, names: Sequence[str]) -> str:
    """The program in an answer.

    Args:
        text: the answer.
        names: functions that are asked for; the first fenced block that defines one of them is taken, else the first
            block. An unclosed fence reaches to the end, without fences the code begins where Python seems to.

    Returns:
        The code, with what cannot be parsed cut off its end where its beginning can be.
    """
    blocks = [textwrap.dedent(block) for block in _FENCE.findall(text)]
    if blocks:
        defining = [block for block in blocks if any(defines(block, name) for name in names)]
        return (defining or blocks)[0].rstrip()
    if _compiles(text):
        return text.rstrip()
    begin = _CODE_BEGIN.search(text)
    return _longest_program(text[begin.start() :]) if begin else text.rstrip()


def defines(code: str, name: str) -> bool:
    """Whether code has a function, a class or a variable of this name at its outermost level."""
    word = re.escape(name)
    forms = rf"(?:async\s+)?def\s+{word}\s*\(|class\s+{word}\s*[(:]|{word}\s*(?::[^=\n]+)?=(?!=)"
    return re.search(rf"^(?:{forms})", code, re.MULTILINE) is not None


def complete(prompt: str, entry_point: str, text: str) -> str:
    """A program that defines a HumanEval function: a whole function, or just its body, both work.

    Args:
        prompt: the problem's imports, helpers, signature and docstring.
        entry_point: the function.
        text: the answer.
    """
    code = extract_code(text, [entry_point])
    if defines(code, entry_point):
        # What comes before the signature may hold imports and helpers that the answer leaves out.
        return f"{prompt[: _signature_start(prompt, entry_point)]}\n{code}\n"
    body = code if _FENCE.search(text) else text.strip("\n")
    # As it is; with a first line that has lost its indentation, as chat templates strip answers; without any.
    attempts = [body] * body[:1].isspace() + [f"    {body.lstrip()}", textwrap.indent(body, "    ")]
    programs = [f"{prompt.rstrip()}\n{attempt.rstrip()}\n" for attempt in attempts]
    return next((program for program in programs if _compiles(program)), programs[0])


def called_names(tests: Sequence[str]) -> list[str]:
    """The names that tests call, in order; among them the function that they test."""
    names: list[str] = []
    for test in tests:
        if _compiles(test):
            calls = [node.func for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
            names += [call.id for call in calls if isinstance(call, ast.Name)]
    return list(dict.fromkeys(names))


def _signature_start(prompt: str, entry_point: str) -> int:
    match = re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", prompt, re.MULTILINE)
    return match.start() if match else len(prompt)


def _longest_program(text: str) -> str:
    """The longest run of lines from the first one that is a program."""
    lines = text.splitlines()
    for end in range(len(lines), 0, -1):
        code = "\n".join(lines[:end])
        if _compiles(code):
            return code.rstrip()
    return text.rstrip()


def _compiles(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an answer's invalid escapes are not ours to report
            # More than parsing: a `return` outside a function is an error here.
            compile(code, "answer", "exec", dont_inherit=True)
            return True
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
