"""What do the two stages and the balanced sampler give? The paper's ablation: three arms, several seeds, one budget.

Run: python -m benchmarks.ablation FUSION --data FILE ... --eval-data FILE ... --output FOLDER [--seeds 0 1 2]

Every arm ends with the same number of stage-2 steps on the same number of rows; the two-stage arms train the gate alone
before that. Domains of unequal size show what balancing does: proportional sampling draws by size.
Arms that are done are not done again, one that was stopped goes on.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import say
from gating.data.conversations import Conversation, DataFile, read_conversations
from gating.files import write_json

ARMS: Mapping[str, tuple[str | None, str]] = {
    "direct": (None, "proportional"),
    "two-stage": ("proportional", "proportional"),
    "two-stage, balanced": ("balanced", "balanced"),
}
"""Sampling in stage 1 (none: no stage 1, a fresh gate goes into stage 2) and in stage 2."""

SUMMARY = "ablation.json"


@dataclass(frozen=True)
class Budget:
    """What every arm gets."""

    stage1_steps: int
    stage2_steps: int
    rows_per_domain: int
    learning_rate: float
    gate_learning_rate: float
    stage1_limit: int
    """Rows of a domain whose hidden states stage 1 computes."""


def main(argv: Sequence[str]) -> None:
    """Train and evaluate all arms; write the summary."""
    options = _parse(argv)
    budget = Budget(**{name: getattr(options, name) for name in Budget.__dataclass_fields__})
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        for arm in ARMS:
            say(f"seed {seed}: {arm}")
            runs.setdefault(arm, []).append(run_arm(options, budget, arm, seed))
    content = {
        "budget": vars(budget) | {"max_length": options.max_length},
        "rows": count_rows(options.data),
        "seeds": options.seeds,
        "arms": {arm: summarise(own) for arm, own in runs.items()},
    }
    write_json(options.output / SUMMARY, content)
    print(json.dumps(content["arms"]))


def run_arm(options: argparse.Namespace, budget: Budget, arm: str, seed: int) -> dict[str, float]:
    """The final evaluation of one arm with one seed."""
    first_sampling, second_sampling = ARMS[arm]
    folder = options.output / f"{arm.replace(', ', '-')}-{seed}"
    start, fresh = options.fusion, ["--fresh-gate"]
    if first_sampling is not None:
        # The states of one seed's rows are computed once: both two-stage arms draw them from the same rows.
        settings = ["--stage", "1", "--cache-states", "--limit", budget.stage1_limit, "--steps", budget.stage1_steps]
        rate = ["--learning-rate", budget.gate_learning_rate, "--sampling", first_sampling]
        start, fresh = _train(options, start, folder / "stage1", seed, budget, [*settings, *rate, "--fresh-gate"]), []
    settings = ["--stage", "2", "--steps", budget.stage2_steps, "--sampling", second_sampling, *fresh]
    rates = ["--learning-rate", budget.learning_rate, "--gate-learning-rate", budget.gate_learning_rate]
    end = _train(
        options, start, folder / "stage2", seed, budget, [*settings, *rates, "--eval-data", *options.eval_data]
    )
    metrics: dict[str, float] = json.loads((end / "manifest.json").read_text(encoding="utf-8"))["metrics"]
    return metrics


def count_rows(files: Sequence[str]) -> dict[str, int]:
    """Conversations of each domain in the training files: proportional sampling draws by them."""
    rows = [row for file in files for _, row, _ in read_conversations(DataFile.parse(file))]
    return dict(Counter(row.domain for row in rows if isinstance(row, Conversation)))


def summarise(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Every seed's value, mean and standard deviation over seeds, of each metric."""
    return {
        name: {
            "values": [run[name] for run in runs],
            "mean": statistics.mean(run[name] for run in runs),
            "stdev": statistics.stdev(run[name] for run in runs) if len(runs) > 1 else None,
        }
        for name in runs[0]
    }


def _train(
    options: argparse.Namespace, fusion: str | Path, output: Path, seed: int, budget: Budget, settings: Sequence[Any]
) -> Path:
    if not (output / "fusion.yaml").is_file():
        output.parent.mkdir(parents=True, exist_ok=True)
        common = [
            "--data", *options.data, "--output", output, "--seed", seed, "--rows-per-domain", budget.rows_per_domain,
            "--micro-rows-per-domain", 1, "--eval-limit", options.eval_limit, "--eval-every", 10**6,
            "--max-length", options.max_length, "--precision", options.precision, "--resume",
        ]  # fmt: skip
        command = [sys.executable, "-m", "server", "train", fusion, *settings, *common]
        with output.with_suffix(".log").open("a", encoding="utf-8") as log:
            subprocess.run([str(word) for word in command], check=True, stdout=log, stderr=log)
    return output


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.ablation", allow_abbrev=False)
    parser.add_argument("fusion", help="the specialists as they enter the two stages")
    parser.add_argument("--data", nargs="+", required=True, help="conversations to train on")
    parser.add_argument("--eval-data", nargs="+", required=True, help="conversations nobody trained on")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs and the summary")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stage1-steps", type=int, default=60)
    parser.add_argument("--stage2-steps", type=int, default=30)
    parser.add_argument("--rows-per-domain", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--gate-learning-rate", type=float, default=1e-3)
    parser.add_argument("--stage1-limit", type=int, default=100)
    parser.add_argument("--eval-limit", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=320)
    parser.add_argument("--precision", default="auto")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
