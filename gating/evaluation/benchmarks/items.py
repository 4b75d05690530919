"""What the benchmarks have in common: a row of a file, an item made of it, its requests, their answers, a verdict.

Knows no benchmark, no server and no score.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ultrafuser.gating.errors import DataError

NUMBER = re.compile(r"[-+]?([0-9]{1,300}(\.[0-9]{0,300})?|\.[0-9]{1,300})([eE][-+]?[0-9]{1,2})?")
"""What a number may look like in a file: small enough to be computed with exactly."""


@dataclass(frozen=True)
class Row:
    """One row of a benchmark's data. A field that is missing, or of another kind than is read, is a DataError."""

    content: Mapping[str, Any]

    source: str
    """Name of the file or of the hub's dataset."""

    number: int
    """Line of the file, or row of the dataset, from 1."""

    def text(self, name: str, *, may_be_empty: bool = False) -> str:
        """A field that is text."""
        value = self._field(name)
        if not isinstance(value, str) or not (may_be_empty or value.strip()):
            raise self._error(name, f"must be text{'' if may_be_empty else ' that is not empty'}, is {value!r:.60}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that is a list of texts, at least one."""
        value = self._field(name)
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise self._error(name, f"must be a list of texts, is {value!r:.60}")
        if not all(isinstance(item, str) for item in value):
            raise self._error(name, "must be a list of texts, and holds something else")
        return tuple(value)

    def number_text(self, name: str) -> str:
        """A field that is a number, or a text with a number in it; as text that is a fraction's."""
        value = self._field(name)
        text = str(value).strip()
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not NUMBER.fullmatch(text):
            raise self._error(name, f"must be a number, is {value!r:.60}")
        return text

    def truths(self, name: str) -> dict[str, bool]:
        """A field that maps texts to 0 or 1, with at least one of each."""
        value = self._field(name)
        if not isinstance(value, Mapping) or not _are_truths(list(value.values())):
            raise self._error(name, "must map answers to 1 (true) or 0 (false), with both kinds")
        return {text: bool(truth) for text, truth in value.items()}

    def identity(self, name: str) -> str:
        """A field that names the row; as text."""
        value = self._field(name)
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise self._error(name, f"must be a name or a number, is {value!r:.60}")
        return str(value)

    def _field(self, name: str) -> Any:
        if name not in self.content:
            raise DataError(
                f"{self.source}:{self.number}: {name}: missing; the file must have the benchmark's own fields"
            )
        return self.content[name]

    def _error(self, name: str, reason: str) -> DataError:
        return DataError(f"{self.source}:{self.number}: {name}: {reason}; correct the file")


def _are_truths(values: Sequence[object]) -> bool:
    return all(isinstance(value, int | float) for value in values) and set(values) == {0, 1}


@dataclass(frozen=True)
class Request:
    """One conversation to be had with the model."""

    id: str
    """Unique within the benchmark, and the same in every run."""

    turns: tuple[str, ...]
    """What the user says; each is sent when the one before has been answered."""

    max_tokens: int | None = None
    """Most tokens of an answer; None leaves it to the run."""

    wants_logprobs: bool = False
    """Whether the first token's most likely candidates are asked for."""


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    id: str
    """Unique within the benchmark."""

    requests: tuple[Request, ...]
    """What has to be asked, in order."""

    reference: Mapping[str, Any]
    """What the benchmark's own scoring needs to know about it."""

    @classmethod
    def asked_once(cls, id: str, prompt: str, reference: Mapping[str, Any]) -> Self:
        """A question that is one message."""
        return cls(id, (Request(id, (prompt,)),), reference)


@dataclass(frozen=True)
class Answer:
    """What became of a request; a line of the answers file."""

    id: str

    texts: tuple[str, ...]
    """The model's turns; fewer than the user's if the request failed."""

    finish_reasons: tuple[str, ...]
    """Of each turn: `stop`, `length`."""

    top_logprobs: tuple[tuple[str, float], ...] | None
    """Candidates for the first token that is not blank, and their log-probabilities in nats; None if there are none."""

    error: str | None
    """Why there is no answer; None if there is one."""

    is_final: bool
    """Whether asking again is pointless: answered, or refused by the server."""

    time: float
    """When it came, in seconds since 1970."""


@dataclass(frozen=True)
class Verdict:
    """What an item's answers are worth; a line of the scores file."""

    id: str

    score: float
    """0 to 1."""

    predicted: str | None = None
    """What was read from the answer."""

    expected: str | None = None
    """What it should have been."""

    problem: str | None = None
    """`unanswered` or `unparsable`: why the score is no judgement of an answer."""

    detail: str | None = None
    """For people: the reason in words."""

    num_right: int | None = None
    """Where an item holds several judgements: how many are right."""

    num_judged: int | None = None
    """Where an item holds several judgements: how many there are."""


Judge = Callable[[Item, Sequence[Answer]], Verdict]
"""Scores an item by the answers to its requests, in their order."""

Answered = Sequence[tuple[Item, Sequence[Answer]]]
"""Items with the answers to their requests."""

Export = Callable[[Path, str, Answered], Path]
"""Writes answers in the form that a judge's own program reads: folder, model, items with answers; returns the file."""


@dataclass(frozen=True)
class HubSource:
    """Where a benchmark lives on the Hugging Face hub."""

    path: str
    """Dataset, as `datasets.load_dataset` takes it."""

    split: str

    config: str | None = None
    """Configuration, if there are several."""

    data_files: str | None = None
    """One file of the dataset, read as JSON, where the dataset itself has another form or is a program."""

    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Gives a row the field names of the benchmark's own files."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: how its rows become requests and its answers a score."""

    name: str
    """As the user writes it."""

    prompts: tuple[str, ...]
    """The fixed texts of its prompts; the version is made of them."""

    hub: HubSource
    """Where its rows come from if no file is given."""

    read: Callable[[Row, bool], Item]
    """Makes an item of a row; the second argument asks for chain of thought, where the benchmark knows it."""

    metric: str | None = None
    """Name of the score; None if it is scored elsewhere."""

    judge: Judge | None = None
    """Scores an item; None if it is scored elsewhere."""

    export: Export | None = None
    """Writes the answers for the program that scores them."""

    executes_code: bool = False
    """Whether scoring runs what the model wrote."""
