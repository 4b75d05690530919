"""Scores out of answers: a verdict on every item, a value with its interval for a benchmark, and a table for people.

Knows verdicts and intervals, not prompts or servers.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ultrafuser.gating.evaluation.benchmarks.intervals import bootstrap_interval, wilson_interval
from ultrafuser.gating.evaluation.benchmarks.items import Answer, Answered, Benchmark, Item, Verdict
from ultrafuser.gating.files import write_json_lines

SCORES_FILE = "scores.jsonl"


def judge_all(benchmark: Benchmark, answered: Answered, tick: Callable[[], object]) -> list[Verdict]:
    """A verdict on each item, in their order. Programs are run one on each processor.

    Args:
        benchmark: one with a judge.
        answered: items with the answers to their requests.
        tick: called after each verdict.
    """

    judge = benchmark.judge
    assert judge is not None

    def verdict_on(entry: tuple[Item, Sequence[Answer]]) -> Verdict:
        item, answers = entry
        if len(answers) == 1 and answers[0].error is not None:
            verdict = Verdict(item.id, 0.0, problem="unanswered", detail=answers[0].error)
        else:
            verdict = judge(item, answers)
        tick()
        return verdict

    with ThreadPoolExecutor(os.cpu_count() if benchmark.executes_code else 1) as pool:
        return list(pool.map(verdict_on, answered))


def summarize(benchmark: Benchmark, verdicts: Sequence[Verdict], seed: int) -> dict[str, Any]:
    """A benchmark's value with its 95 % interval and what it rests on, as JSON values.

    Proportions have Wilson's interval, means of shares a bootstrap over items.
    """
    scores = [verdict.score for verdict in verdicts]
    ones = [1.0] * len(scores)
    if all(score in (0.0, 1.0) for score in scores) and verdicts[0].num_judged is None:
        low, high = wilson_interval(sum(scores), len(scores))
    else:
        low, high = bootstrap_interval(scores, ones, seed)
    problems = [verdict.problem for verdict in verdicts]
    result: dict[str, Any] = {
        "metric": benchmark.metric,
        "value": sum(scores) / len(scores),
        "low": low,
        "high": high,
        "num_items": len(scores),
        "num_unanswered": problems.count("unanswered"),
        "num_unparsable": problems.count("unparsable"),
    }
    if verdicts[0].num_judged is not None:
        result["judgement_accuracy"] = _pooled_accuracy(verdicts, seed)
    return result


def unscored(benchmark: Benchmark, answered: Answered, note: str) -> dict[str, Any]:
    """What is reported of a benchmark whose answers are not scored here."""
    num_unanswered = sum(any(answer.error for answer in answers) for _, answers in answered)
    numbers = {"num_items": len(answered), "num_unanswered": num_unanswered, "num_unparsable": 0}
    return {"metric": benchmark.metric, "value": None, "low": None, "high": None, **numbers, "note": note}


def write_verdicts(path: Path, verdicts: Sequence[Verdict]) -> None:
    """One line an item: what two models' runs are compared by, pair by pair."""
    rows = [{name: value for name, value in asdict(verdict).items() if value is not None} for verdict in verdicts]
    write_json_lines(path, rows)


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results of several benchmarks as lines of text, in percent."""
    rows: list[tuple[str, ...]] = [
        ("benchmark", "metric", "value", "95 % interval", "items", "unanswered", "unparsable")
    ]
    notes = []
    for name, result in results.items():
        counts = (str(result[key]) for key in ("num_items", "num_unanswered", "num_unparsable"))
        rows.append((name, result["metric"] or "-", *_percent(result), *counts))
        if "judgement_accuracy" in result:
            rows.append(("", "yes/no accuracy", *_percent(result["judgement_accuracy"]), "", "", ""))
        if "note" in result:
            notes.append(f"{name}: {result['note']}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *notes])


def _pooled_accuracy(verdicts: Sequence[Verdict], seed: int) -> dict[str, float]:
    right = [float(verdict.num_right or 0) for verdict in verdicts]
    judged = [float(verdict.num_judged or 0) for verdict in verdicts]
    low, high = bootstrap_interval(right, judged, seed)
    return {"value": sum(right) / sum(judged), "low": low, "high": high}


def _percent(result: Mapping[str, Any]) -> tuple[str, str]:
    if result["value"] is None:
        return "-", "-"
    return f"{100 * result['value']:.2f}", f"{100 * result['low']:.2f} to {100 * result['high']:.2f}"
