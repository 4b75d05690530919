"""Held-out loss per domain: the fused model against each specialist, their base, merged weights and equal weights.

Every row of the table is taken on the same response tokens. Knows readings and merged models; does not know the
command line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.evaluation.held_out import FUSED, UNIFORM, ReadingTask
from ultrafuser.gating.evaluation.merging import AVERAGE, BASE, TASK_ARITHMETIC, find_variants
from ultrafuser.gating.evaluation.passes import Reading

BASELINE_PREFIX = "baseline:"
_NUM_RESAMPLES = 2000

Sums = NDArray[np.float64]
"""One number for each conversation."""


@dataclass(frozen=True)
class LossTable:
    """Losses of every row of the table on every conversation, and the gate's weights."""

    sums: Mapping[str, Mapping[str, Sums]]
    """Nats, by row of the table and domain."""

    tokens: Mapping[str, Sums]
    """Response tokens, by domain."""

    gate: Mapping[str, Mapping[str, float]]
    """Mean weight over tokens, by domain and specialist; empty without a gate."""

    notes: tuple[str, ...] = ()
    """Rows that are missing, and why."""

    def loss(self, name: str, domain: str) -> float:
        """Nats per response token."""
        return float(self.sums[name][domain].sum() / self.tokens[domain].sum())

    def mean(self, name: str) -> float:
        """Mean of the domains' losses."""
        return sum(self.loss(name, domain) for domain in self.tokens) / len(self.tokens)

    def as_json(self) -> dict[str, object]:
        """`loss` by row and domain with `mean`, `gate` by domain and specialist."""
        loss = {
            name: {**{domain: self.loss(name, domain) for domain in self.tokens}, "mean": self.mean(name)}
            for name in self.sums
        }
        return {"loss": loss, "gate": {domain: dict(weights) for domain, weights in self.gate.items()}}

    def with_baseline(self, other: "LossTable") -> "LossTable":
        """This table with another's rows below, their names marked.

        Raises:
            CommandError: the other was not taken on the same tokens.
        """
        if any(own.tolist() != other.tokens[domain].tolist() for domain, own in self.tokens.items()):
            raise CommandError("--baseline: it reads other response tokens; name a fusion with the same tokenizer")
        marked = {f"{BASELINE_PREFIX}{name}": sums for name, sums in other.sums.items()}
        notes = [f"{BASELINE_PREFIX} {note}" for note in other.notes]
        return LossTable({**self.sums, **marked}, self.tokens, self.gate, (*self.notes, *notes))

    def difference(self, name: str, other: str, seed: int = 0) -> dict[str, tuple[float, float, float]]:
        """How much lower or higher one row's loss is than another's, relative to it, by domain and for the `mean`.

        Returns:
            (value, low, high): with a 95 % interval by paired bootstrap over conversations, 0.01 being one percent.
        """
        generator = np.random.default_rng(seed)
        means = {row: np.zeros(1 + _NUM_RESAMPLES) for row in (name, other)}
        found = {}
        for domain, tokens in self.tokens.items():
            draws = generator.integers(len(tokens), size=(_NUM_RESAMPLES, len(tokens)))
            losses = {row: _resampled(self.sums[row][domain], tokens, draws) for row in (name, other)}
            found[domain] = _interval(losses[name], losses[other])
            for row, values in losses.items():
                means[row] += values / len(self.tokens)
        return {**found, "mean": _interval(means[name], means[other])}


def check_rows(specialists: Sequence[str]) -> None:
    """Specialists are rows of the table, beside others that have names of their own.

    Raises:
        CommandError: one is named like those.
    """
    odd = sorted({BASE, AVERAGE, TASK_ARITHMETIC, UNIFORM, FUSED} & set(specialists))
    if odd:
        raise CommandError(f"specialists: {odd[0]!r} is the name of a row of the table; rename the specialist")


def measure(task: ReadingTask, *, base: str | None, scale: float) -> LossTable:
    """All rows of the table that can be had; those that cannot are in its notes.

    Args:
        task: the fusion and the conversations.
        base: the model that the specialists were made from; default: the one they all name.
        scale: of task arithmetic.

    Raises:
        CommandError: a specialist is named as a row of the table.
    """
    names = task.loaded.specialist_names
    check_rows(names)
    reading = task.read_fusion()
    variants, notes = find_variants(
        task.loaded,
        task.prepared,
        task.info.num_shared_ids,
        base=base,
        scale=scale,
        cache_dir=task.options.cache_dir,
        on_progress=task.on_progress,
    )
    losses = {name: reading.losses[name] for name in names}
    for model in variants:
        losses[model.name] = task.read_alone(model).losses[model.name]
    losses |= {name: reading.losses[name] for name in (UNIFORM, FUSED) if name in reading.losses}
    counts = np.diff(reading.offsets).astype(np.float64)
    sums = {name: _row_sums(losses_N, reading) for name, losses_N in losses.items()}
    places = task.places
    return LossTable(
        {name: {domain: own[rows] for domain, rows in places.items()} for name, own in sums.items()},
        {domain: counts[rows] for domain, rows in places.items()},
        _mean_weights(reading, places, counts, names),
        notes,
    )


def _row_sums(losses_N: Tensor, reading: Reading) -> Sums:
    padded = torch.cat([torch.zeros(1, dtype=torch.float64), losses_N.double().cumsum(0)])
    return np.diff(padded[torch.tensor(reading.offsets)].numpy())


def _mean_weights(
    reading: Reading, places: Mapping[str, Sequence[int]], counts: Sums, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    if FUSED not in reading.weights:
        return {}
    sums = [_row_sums(weights_N, reading) for weights_N in reading.weights[FUSED]]
    return {
        domain: {name: float(own[rows].sum() / counts[rows].sum()) for name, own in zip(names, sums, strict=True)}
        for domain, rows in places.items()
    }


def _resampled(sums: Sums, tokens: Sums, draws: NDArray[np.int64]) -> Sums:
    """Nats per token of the conversations themselves, then of every draw of them."""
    return np.concatenate([[sums.sum() / tokens.sum()], sums[draws].sum(axis=1) / tokens[draws].sum(axis=1)])


def _interval(ours: Sums, theirs: Sums) -> tuple[float, float, float]:
    relative = ours / theirs - 1
    low, high = np.quantile(relative[1:], [0.025, 0.975])
    return float(relative[0]), float(low), float(high)


def describe(table: LossTable) -> list[str]:
    """The table as lines of Markdown: losses, the gate's mean weights, and fused against the best single model."""
    domains = list(table.tokens)
    lines = [
        _line(["nats per response token", *domains, "mean"]),
        _line(["---", *["---:"] * (len(domains) + 1)]),
        *(_line([name, *(f"{table.loss(name, domain):.4f}" for domain in domains), f"{table.mean(name):.4f}"])
          for name in table.sums),
    ]  # fmt: skip
    if table.gate:
        names = list(next(iter(table.gate.values())))
        lines += ["", _line(["mean gate weight", *names]), _line(["---", *["---:"] * len(names)])]
        lines += [_line([domain, *(f"{own[name]:.3f}" for name in names)]) for domain, own in table.gate.items()]
        lines += ["", *_comparison(table, names)]
    return [*lines, *table.notes]


def _comparison(table: LossTable, names: Sequence[str]) -> list[str]:
    """Fused against the best single specialist of each domain, and of the mean; as they entered, if that is known."""
    marked = [f"{BASELINE_PREFIX}{name}" for name in names]
    singles = marked if all(name in table.sums for name in marked) else list(names)
    lines = []
    for place in (*table.tokens, "mean"):
        losses = {name: table.mean(name) if place == "mean" else table.loss(name, place) for name in singles}
        best = min(losses, key=losses.__getitem__)
        value, low, high = table.difference(FUSED, best)[place]
        lines.append(f"{place}: fused {value:+.2%} [{low:+.2%}, {high:+.2%}] against the best specialist ({best})")
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
