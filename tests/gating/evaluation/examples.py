"""A few hand-written rows of each benchmark, in the benchmarks' own fields."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {
            "question": f"Ann has {n} pens and buys {n} more. How many has she?",
            "answer": f"{n}+{n}={2 * n}\n#### {2 * n}",
        }
        for n in range(600, 640)
    ],
    "svamp": [
        {
            "ID": "own-1",
            "Body": "A box holds 12 eggs",
            "Question": "How many eggs are in 3 boxes?",
            "Equation": "( 12.0 * 3.0 )",
            "Answer": 36.0,
            "Type": "Multiplication",
        },
        {
            "ID": "own-2",
            "Body": "Ben is 2 years old.",
            "Question": "How old was he 5 years ago?",
            "Equation": "( 2.0 - 5.0 )",
            "Answer": "-3",
            "Type": "Subtraction",
        },
    ],
    "aqua": [
        {
            "question": "What is 7 times 8?",
            "options": ["A)54", "B)56", "C)58", "D)63", "E)65"],
            "rationale": "56",
            "correct": "B",
        }
    ],
    "sat_math": [
        {
            "passage": "",
            "question": "If $x+2=5$, what is $x$?",
            "options": ["(A)1", "(B)2", "(C)3", "(D)4"],
            "label": "C",
            "other": {},
        },
        {
            "passage": "Let $f(x)=2x$.",
            "question": "What is $f(4)$?",
            "options": ["(A)2", "(B)4", "(C)6", "(D)8"],
            "label": "D",
            "other": {},
        },
    ],
    "humaneval": [
        {
            "task_id": "Own/0",
            "prompt": 'import math\n\n\ndef half_root(x: float) -> float:\n    """ Half of the square root.\n    """\n',
            "entry_point": "half_root",
            "canonical_solution": "    return math.sqrt(x) / 2\n",
            "test": "\n\ndef check(candidate):\n    assert candidate(16.0) == 2.0\n    assert candidate(0.0) == 0.0\n",
        }
    ],
    "mbpp": [
        {
            "text": "Write a function that doubles a number.",
            "code": "def double(x):\r\n    return 2 * x",
            "task_id": 7,
            "test_setup_code": "two = 2",
            "test_list": ["assert double(two) == 4", "assert double(-1) == -2"],
            "challenge_test_list": [],
        }
    ],
    "truthfulqa": [
        {
            "Question": "Is ice colder than steam?",
            "mc2_targets": {"Ice is colder.": 1, "Steam is hotter.": 1, "Both are equal.": 0, "Ice is hotter.": 0},
        },
        {"Question": "Do cats bark?", "mc2_targets": {"They meow.": 1, "They bark.": 0}},
    ],
    "mt_bench": [
        {"question_id": 3, "category": "writing", "turns": ["Name a river.", "Name another one."]},
        {"question_id": 4, "category": "math", "turns": ["What is 2+2?", "Double it."], "reference": ["4", "8"]},
    ],
    "alpaca_eval": [
        {"instruction": "How do I fold a shirt?", "dataset": "own", "output": "", "generator": "someone"},
        {"instruction": "What is rain?", "dataset": "own", "output": "", "generator": "someone"},
    ],
}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """JSON lines, gzipped if the name says so."""
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path
