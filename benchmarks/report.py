"""Writes docs/results.md: one table per benchmark out of its newest result. No number is copied by hand.

Run: python -m benchmarks.report
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import REPOSITORY, Environment
from benchmarks.measure import Comparison, Measured
from benchmarks.quality import NAME as QUALITY
from benchmarks.quality import Quality, describe
from benchmarks.result import RESULTS_FOLDER, Result, newest_result, read_result
from benchmarks.soak import NAME as SOAK
from benchmarks.soak import Soak
from benchmarks.soak import describe as describe_soak

NAMES = (
    "decode_step",
    "metrics_cost",
    "gate_kinds",
    "prefill",
    "speculation",
    "placement",
    "serve_overhead",
    "fleet",
    "peers",
    "batch_invariance",
    "data_throughput",
    "gpu_check",
    "gpu_step",
)
"""The benchmarks in the order of the page."""

PAGE = REPOSITORY / "docs" / "results.md"

_INTRODUCTION = """\
# Results

Ratios first: absolute times belong to the hardware below each table. Every table is the newest run of its benchmark;
`python -m benchmarks.report` writes this page from `benchmarks/results/`, nobody edits it. Measure again with
`make bench`, or one by one with the command below a table."""

_QUALITY_QUESTION = """\
Is the fused model worth it? The demo (3 x 135M parameters) on conversations that nobody trained on, made and measured
by `gating/demo/recipe.sh` (step 4); rows are explained in [evaluation.md](evaluation.md). `baseline` rows are stage 1's
result, with the specialists as they entered stage 2; these and their average are the benchmarks' single models."""

_SOAK_QUESTION = """\
Does anything get lost or leak? Short requests to one server with the tests' tiny model; a fifth of the clients leave
before their response is complete."""

_NOT_RUN = "No result is filed yet. Run `python -m benchmarks.{name}`, then `python -m benchmarks.report`."


def render_page(results_folder: Path, page: Path = PAGE) -> str:
    """The page as Markdown; links are relative to `page`."""
    sections = [_section(name, newest_result(results_folder, name), page.parent) for name in NAMES]
    quality = _quality(newest_result(results_folder, QUALITY), page.parent)
    soak = _soak(newest_result(results_folder, SOAK), page.parent)
    return "\n\n".join([_INTRODUCTION, quality, *sections, soak]) + "\n"


def _quality(path: Path | None, folder: Path) -> str:
    if path is None:
        return f"## {QUALITY}\n\n{_NOT_RUN.format(name=QUALITY)}"
    quality = Quality.model_validate_json(path.read_text(encoding="utf-8"))
    where = _where(quality.environment, quality.date, Path(os.path.relpath(path, folder)).as_posix())
    return "\n\n".join([f"## {QUALITY}", _QUALITY_QUESTION, describe(quality), where])


def _soak(path: Path | None, folder: Path) -> str:
    if path is None:
        return f"## {SOAK}\n\n{_NOT_RUN.format(name=SOAK)}"
    soak = Soak.model_validate_json(path.read_text(encoding="utf-8"))
    where = _where(soak.environment, soak.date, Path(os.path.relpath(path, folder)).as_posix())
    return "\n\n".join([f"## {SOAK}", _SOAK_QUESTION, describe_soak(soak), where])


def _section(name: str, path: Path | None, folder: Path) -> str:
    if path is None:
        return f"## {name}\n\n{_NOT_RUN.format(name=name)}"
    result = read_result(path)
    question = result.question
    link = os.path.relpath(path, folder)
    ended = [f"**Not complete**: the run was ended by {result.ended_by}."] if result.ended_by else []
    return "\n\n".join(
        [
            f"## {name}",
            f"{question.text} {question.method}",
            *ended,
            _table(result),
            f"![{name}]({Path(link).with_suffix('.png').as_posix()})",
            _where(result.environment, result.date, Path(link).as_posix()),
        ]
    )


def _table(result: Result) -> str:
    has_samples = any(
        side.mean is not None for item in result.comparisons for side in (item.fused, item.baseline) if side
    )
    extra = ["mean", "p99"] if has_samples else []
    question = result.question
    header = ["case", "unit", question.fused, *extra, question.baseline, *extra, question.ratio, "bar", "met"]
    lines = [header, ["---"] * len(header)]
    lines += [_row(item, has_samples) for item in result.comparisons]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(item: Comparison, has_samples: bool) -> list[str]:
    bar = f"{item.bar.direction} {item.bar.limit:g}" if item.bar else "-"
    met = {True: "yes", False: "**no**", None: "-"}[item.is_met]
    sides = [*_cells(item.fused, has_samples), *_cells(item.baseline, has_samples)]
    case = f"{item.case} ({item.note})" if item.note else item.case
    return [case, item.unit, *sides, f"**{_number(item.ratio)}**", bar, met]


def _cells(side: Measured | None, has_samples: bool) -> list[str]:
    value = _number(side.value if side else None)
    if not has_samples:
        return [value]
    return [value, _number(side.mean if side else None), _number(side.p99 if side else None)]


def _number(value: float | None) -> str:
    """Three significant digits, or whole numbers from 100 on."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _where(environment: Environment, date: str, link: str) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in environment.versions.items())
    settings = ", ".join(f"{name}={value}" for name, value in environment.settings.items()) or "none set"
    lines: Sequence[str] = [
        f"`{environment.command}`",
        f"{date}, commit {environment.commit}, [all numbers]({link})",
        f"{environment.hardware}; load before the start {environment.load:g}; settings: {settings}",
        versions,
    ]
    return "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render_page(RESULTS_FOLDER), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(REPOSITORY)}", file=sys.stderr)
