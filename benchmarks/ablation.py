"""What do the two stages and the balanced sampler give? The paper's ablation: three arms, several seeds, one budget.

Run: python -m benchmarks.ablation FUSION --data FILE ... --eval-data FILE ... --output FOLDER [--seeds 0 1 2]

Every arm ends with the same number of stage-2 steps on the same number of rows; the two-stage arms train the gate alone
before that. Domains of unequal size show what balancing does: proportional sampling draws by size.
Arms that are done are not done again, one that was stopped goes on.
"""

import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import parse_options, say
from benchmarks.measure import Frozen
from ultrafuser.gating.data.conversations import Conversation, DataFile, read_conversations
from ultrafuser.gating.files import write_json

ARMS: Mapping[str, tuple[str | None, str]] = {
    "direct": (None, "proportional"),
    "two-stage": ("proportional", "proportional"),
    "two-stage, balanced": ("balanced", "balanced"),
}
"""Sampling in stage 1 (none: no stage 1, a fresh gate goes into stage 2) and in stage 2."""

SUMMARY = "ablation.json"


class Budget(Frozen):
    """What every arm gets."""

    stage1_steps: int = 60
    stage2_steps: int = 30
    rows_per_domain: int = 2
    learning_rate: float = 3e-4
    gate_learning_rate: float = 1e-3
    stage1_limit: int = 100
    """Rows of a domain whose hidden states stage 1 computes."""
    max_length: int = 320


class Options(Budget):
    """What was asked for."""

    fusion: str
    """The specialists as they enter the two stages."""
    data: tuple[str, ...]
    """Conversations to train on."""
    eval_data: tuple[str, ...]
    """Conversations nobody trained on."""
    output: Path
    """Folder for the runs and the summary."""
    seeds: tuple[int, ...] = (0, 1, 2)
    eval_limit: int = 60
    precision: str = "auto"


def main(argv: Sequence[str]) -> None:
    """Train and evaluate all arms; write the summary."""
    usage = "FUSION --data FILE ... --eval-data FILE ... --output FOLDER"
    question = str(__doc__).partition("\n")[0]
    options = parse_options(Options, "ablation", argv, description=question, usage=usage, positional="fusion")
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        for arm in ARMS:
            say(f"seed {seed}: {arm}")
            runs.setdefault(arm, []).append(run_arm(options, arm, seed))
    content = {
        "budget": options.model_dump(include=set(Budget.model_fields)),
        "rows": count_rows(options.data),
        "seeds": options.seeds,
        "arms": {arm: summarise(own) for arm, own in runs.items()},
    }
    write_json(options.output / SUMMARY, content)
    print(json.dumps(content["arms"]))


def run_arm(options: Options, arm: str, seed: int) -> dict[str, float]:
    """The final evaluation of one arm with one seed."""
    first_sampling, second_sampling = ARMS[arm]
    folder = options.output / f"{arm.replace(', ', '-')}-{seed}"
    start: str | Path = options.fusion
    fresh = ["--fresh-gate"]
    if first_sampling is not None:
        # The states of one seed's rows are computed once: both two-stage arms draw them from the same rows.
        settings = ["--stage", 1, "--cache-states", "--limit", options.stage1_limit, "--steps", options.stage1_steps]
        rate = ["--learning-rate", options.gate_learning_rate, "--sampling", first_sampling]
        start, fresh = _train(options, start, folder / "stage1", seed, [*settings, *rate, "--fresh-gate"]), []
    settings = ["--stage", 2, "--steps", options.stage2_steps, "--sampling", second_sampling, *fresh]
    rates = ["--learning-rate", options.learning_rate, "--gate-learning-rate", options.gate_learning_rate]
    end = _train(options, start, folder / "stage2", seed, [*settings, *rates, "--eval-data", *options.eval_data])
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


def _train(options: Options, fusion: str | Path, output: Path, seed: int, settings: Sequence[Any]) -> Path:
    if not (output / "fusion.yaml").is_file():
        output.parent.mkdir(parents=True, exist_ok=True)
        common = [
            "--data", *options.data, "--output", output, "--seed", seed, "--rows-per-domain", options.rows_per_domain,
            "--micro-rows-per-domain", 1, "--eval-limit", options.eval_limit, "--eval-every", 10**6,
            "--max-length", options.max_length, "--precision", options.precision, "--resume",
        ]  # fmt: skip
        command = [sys.executable, "-m", "ultrafuser.server", "train", fusion, *settings, *common]
        with output.with_suffix(".log").open("a", encoding="utf-8") as log:
            subprocess.run([str(word) for word in command], check=True, stdout=log, stderr=log)
    return output


if __name__ == "__main__":
    main(sys.argv[1:])
