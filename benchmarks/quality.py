"""Is the fused model worth it? Files what evaluation and ablation wrote as one dated result; the report shows it.

Run: python -m benchmarks.quality --losses loss.md [--ablation ablation.json] [--scores NAME=FOLDER ...]

The files come from `gating/demo/recipe.sh` (losses), `python -m benchmarks.ablation` and `ultrafuser eval --benchmark`.
Nothing is measured here.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import Environment, describe_environment
from benchmarks.measure import Frozen
from benchmarks.result import RESULTS_FOLDER, newest_result, today
from ultrafuser.gating.files import write_json

NAME = "quality"
_METRICS = ("eval_loss", "eval_loss_text", "eval_loss_code", "eval_loss_math")


class Quality(Frozen):
    """What was found out about the demo's quality."""

    date: str
    """Day of the filing, UTC, YYYY-MM-DD."""

    losses: str
    """The table that `ultrafuser eval --loss` printed, Markdown."""

    ablation: dict[str, Any] | None
    """Budget, seeds and arms, as `benchmarks.ablation` wrote them."""

    scores: dict[str, dict[str, Any]]
    """By served model: the content of results.json of `ultrafuser eval --benchmark`."""

    environment: Environment
    """Where it was filed, on the machine that measured it."""


def main(argv: Sequence[str]) -> Path:
    """Read the files and write the result; returns its path. Parts that are not given stay those of the last filing."""
    options = _parse(argv)
    last = newest_result(options.results, NAME)
    before: Mapping[str, Any] = json.loads(last.read_text(encoding="utf-8")) if last else {}
    scores = {name: _read(Path(folder) / "results.json") for name, folder in map(_pair, options.scores)}
    quality = Quality(
        date=today(),
        losses=options.losses.read_text(encoding="utf-8") if options.losses else before.get("losses", ""),
        ablation=_read(options.ablation) if options.ablation else before.get("ablation"),
        scores=scores or before.get("scores", {}),
        environment=describe_environment(f"benchmarks.{NAME}", []),
    )
    path: Path = options.results / f"{quality.date}-{NAME}.json"
    write_json(path, quality.model_dump(mode="json"))
    return path


def describe(quality: Quality) -> str:
    """The result as sections of Markdown."""
    parts = [quality.losses.strip()]
    if quality.ablation is not None:
        parts += ["### Ablation", _describe_budget(quality.ablation), _ablation_table(quality.ablation["arms"])]
    if quality.scores:
        parts += ["### Benchmarks", _describe_scores(quality.scores), _score_table(quality.scores)]
    return "\n\n".join(part for part in parts if part)


def _describe_budget(ablation: Mapping[str, Any]) -> str:
    budget = ablation["budget"]
    rows = ", ".join(f"{count:,} {domain}" for domain, count in ablation["rows"].items())
    return (
        f"Every arm: {budget['stage2_steps']} steps of stage 2 on {budget['rows_per_domain']} x 3 rows, learning rate"
        f" {budget['learning_rate']:g} (gate {budget['gate_learning_rate']:g}). The two-stage arms train the gate alone"
        f" before that: {budget['stage1_steps']} steps on {budget['stage1_limit']} rows of each domain. Training rows:"
        f" {rows}; proportional sampling (the first two arms) draws by these numbers, balanced sampling the same number"
        f" of each. Conversations of at most {budget['max_length']} tokens. Validation loss"
        f" in nats per response token: mean and standard deviation over {len(ablation['seeds'])} seeds, every seed's"
        " value of the mean over domains."
    )


def _ablation_table(arms: Mapping[str, Any]) -> str:
    lines = [["arm", "mean", "text", "code", "math", "every seed"], ["---"] * 6]
    for name, metrics in arms.items():
        values = " ".join(f"{value:.4f}" for value in metrics["eval_loss"]["values"])
        lines.append([name, *(_spread(metrics[metric]) for metric in _METRICS), values])
    return _table(lines)


def _spread(metric: Mapping[str, Any]) -> str:
    return f"{metric['mean']:.4f} ± {metric['stdev']:.4f}" if metric["stdev"] is not None else f"{metric['mean']:.4f}"


def _describe_scores(scores: Mapping[str, Any]) -> str:
    first = next(iter(scores.values()))
    thought = "with" if first["chain_of_thought"] else "without"
    limit = f", {first['limit']} items drawn at random, the same for every model" if first["limit"] else ""
    return (
        f"Zero-shot, {thought} chain of thought, temperature 0, at most {first['max_tokens']} tokens{limit}; in percent"
        " with 95 % intervals. `ultrafuser eval FUSION --variants DIR`, then for each model `ultrafuser serve FILE` and"
        " `ultrafuser eval --benchmark gsm8k=FILE ... --output DIR --execute-code`."
    )


def _score_table(scores: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for own in scores.values() for name in own["benchmarks"]))
    lines = [["model", *names], ["---"] * (1 + len(names))]
    for model, own in scores.items():
        lines.append([model, *(_score(own["benchmarks"].get(name)) for name in names)])
    return _table(lines)


def _score(result: Mapping[str, Any] | None) -> str:
    if result is None or result.get("value") is None:
        return "-"
    low, value, high = (100 * result[name] for name in ("low", "value", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}] of {result['num_items']}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pair(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    return name, folder


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(f"python -m benchmarks.{NAME}", allow_abbrev=False)
    parser.add_argument("--losses", type=Path, help="what `ultrafuser eval --loss` printed")
    parser.add_argument("--ablation", type=Path, help="ablation.json")
    parser.add_argument("--scores", nargs="+", default=[], help="MODEL=FOLDER of `ultrafuser eval --benchmark`")
    parser.add_argument("--results", type=Path, default=RESULTS_FOLDER, help="where the result is filed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    print(main(sys.argv[1:]))
