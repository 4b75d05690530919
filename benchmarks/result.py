"""A benchmark's result: what was compared, the verdict, and where it was measured. Written once, read by the report."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, Environment
from benchmarks.measure import Comparison, Frozen, verdict
from benchmarks.plot import plot_comparisons

RESULTS_FOLDER = REPOSITORY / "benchmarks" / "results"


class Question(Frozen):
    """What a benchmark asks, and the words of its answer."""

    name: str
    """The script's name."""

    text: str
    """The question, one sentence."""

    fused: str
    """What our side is: "fused step"."""

    baseline: str
    """What the other side is."""

    ratio: str
    """What the ratio is: "fused / baseline"."""

    method: str
    """How it was measured, in one or two sentences: what alternates with what, and what is left out."""


class Result(Frozen):
    """One run of one benchmark."""

    question: Question
    """What was asked."""

    date: str
    """Day of the run, UTC, YYYY-MM-DD."""

    comparisons: tuple[Comparison, ...]
    """The measured cases."""

    environment: Environment
    """Where."""

    ended_by: str | None = None
    """The error that ended the run before all was measured; null: none."""

    @property
    def summary(self) -> dict[str, Any]:
        """The verdict as a script prints it in its last line."""
        return {
            "name": self.question.name,
            "ratios": {item.key: _rounded(item.ratio) for item in self.comparisons},
            "bars": {item.key: {item.bar.direction: item.bar.limit} for item in self.comparisons if item.bar},
            "ok": None if self.ended_by else verdict(self.comparisons),
        }

    def write(self, folder: Path) -> Path:
        """Write YYYY-MM-DD-NAME.json and the plot beside it; a second run of the day replaces the first.

        One that an error has ended never replaces a whole one: it is YYYY-MM-DD-NAME-ended.json then.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.date}-{self.question.name}.json"
        if self.ended_by and path.exists() and not read_result(path).ended_by:
            path = path.with_stem(f"{path.stem}-ended")
        content = {**self.summary, **self.model_dump(mode="json")}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        plot_comparisons(self.comparisons, self.question.fused, self.question.baseline, path.with_suffix(".png"))
        return path


def read_result(path: Path) -> Result:
    """A result that `Result.write` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Result.model_validate({name: value for name, value in content.items() if name in Result.model_fields})


def newest_result(folder: Path, name: str) -> Path | None:
    """The newest result of a benchmark, by the date in its name; None if there is none."""
    return max(folder.glob(f"????-??-??-{name}.json"), default=None)


def today() -> str:
    """The day that results are filed under."""
    return datetime.now(UTC).date().isoformat()


def _rounded(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 4)
