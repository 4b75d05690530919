"""Every answer of a benchmark as a line of a file, written when it comes.

A second run finds what the first one left, whenever that ended. Knows files, not servers or scores.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from ultrafuser.gating.commands.run_folder import append_line, whole_lines
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.evaluation.benchmarks.items import Answer, Item, Request
from ultrafuser.gating.json_text import JsonError, parse_json

ANSWERS_FILE = "answers.jsonl"
_ANSWER = TypeAdapter(Answer)


class AnswersFile:
    """The answers of one benchmark, on disk and in memory. A context manager."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line without its end was being written when a run was killed, and is cut off.

        Raises:
            CommandError: a line is no answer.
        """
        lines = enumerate(whole_lines(path), start=1)
        self._answers = {answer.id: answer for answer in (_parse(path, number, line) for number, line in lines)}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    def append(self, answer: Answer) -> None:
        """Keep an answer; it is in the file when this returns."""
        append_line(self._file, json.dumps(asdict(answer), ensure_ascii=False))
        self._answers[answer.id] = answer

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """Those to be asked: without an answer, or failed in a way that may not happen again."""
        return [request for request in requests if not (answer := self._answers.get(request.id)) or not answer.is_final]

    def of(self, item: Item) -> list[Answer]:
        """The answers to an item's requests, in their order; all must have been asked."""
        return [self._answers[request.id] for request in item.requests]


def _parse(path: Path, number: int, line: bytes) -> Answer:
    try:
        return _ANSWER.validate_python(parse_json(line))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'row'}: {first['msg']}"
    except JsonError as error:
        reason = str(error)
    raise CommandError(f"{path}:{number}: not an answer ({reason}); delete the line to ask again")
