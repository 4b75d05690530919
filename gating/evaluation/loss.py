"""Held-out loss per domain: the fused model against each specialist, their base, merged weights and equal weights.

Every row of the table is taken on the same response tokens. Knows readings and merged models; does not know the
command line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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

Interval = tuple[float, float, float]
"""A value, and the low and the high end of its 95 % interval."""


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

    kinds: Mapping[str, str] = field(default_factory=dict)
    """Of the gates that are compared, by row, the fusion's own first; empty without others."""

    def loss(self, name: str, domain: str) -> float:
        """Nats per response token."""
        return float(self.sums[name][domain].sum() / self.tokens[domain].sum())

    def mean(self, name: str) -> float:
        """Mean of the domains' losses."""
        return sum(self.loss(name, domain) for domain in self.tokens) / len(self.tokens)

    def as_json(self) -> dict[str, object]:
        """`loss` by row and domain with `mean`, `gate` by domain and specialist; of several gates `gates` by row: the
        `kind`, 95 % intervals of the losses, and how these differ from the fusion's own gate, relative to it."""
        loss = {
            name: {**{domain: self.loss(name, domain) for domain in self.tokens}, "mean": self.mean(name)}
            for name in self.sums
        }
        gates = {
            name: {"kind": kind, "interval": self.interval(name), "against_fused": self.difference(name, FUSED)}
            for name, kind in self.kinds.items()
        }
        weights = {domain: dict(own) for domain, own in self.gate.items()}
        return {"loss": loss, "gate": weights, **({"gates": gates} if gates else {})}

    def with_baseline(self, other: "LossTable") -> "LossTable":
        """This table with another's rows below, their names marked.

        Raises:
            CommandError: the other was not taken on the same tokens.
        """
        if any(own.tolist() != other.tokens[domain].tolist() for domain, own in self.tokens.items()):
            raise CommandError("--baseline: it reads other response tokens; name a fusion with the same tokenizer")
        marked = {f"{BASELINE_PREFIX}{name}": sums for name, sums in other.sums.items()}
        notes = [f"{BASELINE_PREFIX} {note}" for note in other.notes]
        return replace(self, sums={**self.sums, **marked}, notes=(*self.notes, *notes))

    def interval(self, name: str) -> dict[str, Interval]:
        """One row's loss, by domain and for the `mean`, with a 95 % interval by bootstrap over conversations."""
        return {place: _interval(values) for place, values in self._resampled(name).items()}

    def difference(self, name: str, other: str) -> dict[str, Interval]:
        """How much lower or higher one row's loss is than another's, relative to it, 0.01 being one percent; as
        `interval`, paired."""
        theirs = self._resampled(other)
        return {place: _interval(values / theirs[place] - 1) for place, values in self._resampled(name).items()}

    def _resampled(self, name: str) -> dict[str, Sums]:
        """One row's losses by domain and for the `mean`: of the conversations themselves, then of draws of them, which
        are the same for every row."""
        generator = np.random.default_rng(0)
        found, means = {}, np.zeros(1 + _NUM_RESAMPLES)
        for domain, tokens in self.tokens.items():
            draws = generator.integers(len(tokens), size=(_NUM_RESAMPLES, len(tokens)))
            found[domain] = _resampled(self.sums[name][domain], tokens, draws)
            means += found[domain] / len(self.tokens)
        return {**found, "mean": means}


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
    kinds = task.gate_kinds
    losses |= {name: reading.losses[name] for name in (UNIFORM, *kinds) if name in reading.losses}
    counts = np.diff(reading.offsets).astype(np.float64)
    sums = {name: row_sums(losses_N, reading.offsets) for name, losses_N in losses.items()}
    places = task.places
    return LossTable(
        {name: {domain: own[rows] for domain, rows in places.items()} for name, own in sums.items()},
        {domain: counts[rows] for domain, rows in places.items()},
        _mean_weights(reading, places, counts, names),
        notes,
        kinds if task.gates else {},
    )


def row_sums(values_N: Tensor, offsets: Sequence[int]) -> Sums:
    """Sums of tokens between the offsets."""
    padded = torch.cat([torch.zeros(1, dtype=torch.float64), values_N.double().cumsum(0)])
    return np.diff(padded[torch.tensor(offsets)].numpy())


def _mean_weights(
    reading: Reading, places: Mapping[str, Sequence[int]], counts: Sums, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    if FUSED not in reading.weights:
        return {}
    sums = [row_sums(weights_N, reading.offsets) for weights_N in reading.weights[FUSED]]
    return {
        domain: {name: float(own[rows].sum() / counts[rows].sum()) for name, own in zip(names, sums, strict=True)}
        for domain, rows in places.items()
    }


def _resampled(sums: Sums, tokens: Sums, draws: NDArray[np.int64]) -> Sums:
    """Nats per token of the conversations themselves, then of every draw of them."""
    return np.concatenate([[sums.sum() / tokens.sum()], sums[draws].sum(axis=1) / tokens[draws].sum(axis=1)])


def _interval(values: Sums) -> Interval:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)


def describe(table: LossTable) -> list[str]:
    """The table as lines of Markdown: losses, the gate's mean weights, and fused against the best single model."""
    domains = list(table.tokens)
    lines = [
        line(["nats per response token", *domains, "mean"]),
        line(["---", *["---:"] * (len(domains) + 1)]),
        *(line([name, *(f"{table.loss(name, domain):.4f}" for domain in domains), f"{table.mean(name):.4f}"])
          for name in table.sums),
    ]  # fmt: skip
    if table.gate:
        names = list(next(iter(table.gate.values())))
        lines += ["", line(["mean gate weight", *names]), line(["---", *["---:"] * len(names)])]
        lines += [line([domain, *(f"{own[name]:.3f}" for name in names)]) for domain, own in table.gate.items()]
        lines += ["", *_comparison(table, names)]
    return [*lines, *_gates(table), *table.notes]


def _comparison(table: LossTable, names: Sequence[str]) -> list[str]:
    """Fused against the best single specialist of each domain, and of the mean; as they entered, if that is known."""
    marked = [f"{BASELINE_PREFIX}{name}" for name in names]
    singles = marked if all(name in table.sums for name in marked) else list(names)
    lines = []
    for place in (*table.tokens, "mean"):
        losses = {name: table.mean(name) if place == "mean" else table.loss(name, place) for name in singles}
        best = min(losses, key=losses.__getitem__)
        difference = percent(table.difference(FUSED, best)[place])
        lines.append(f"{place}: fused {difference} against the best specialist ({best})")
    return lines


def _gates(table: LossTable) -> list[str]:
    """Every gate's losses with their intervals, and in percent how they differ from those of the fusion's own."""
    if not table.kinds:
        return []
    places = [*table.tokens, "mean"]
    lines = ["", line(["gate", "kind", *places]), line(["---", "---", *["---:"] * len(places)])]
    for name, kind in table.kinds.items():
        losses, differences = table.interval(name), table.difference(name, FUSED)
        lines.append(line([name, kind, *("{:.4f} [{:.4f}, {:.4f}]".format(*losses[place]) for place in places)]))
        if name != FUSED:
            lines.append(line(["against fused", "", *(percent(differences[place]) for place in places)]))
    return lines


def percent(interval: Interval) -> str:
    """A relative difference for people."""
    return "{:+.2%} [{:+.2%}, {:+.2%}]".format(*interval)


def line(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"
