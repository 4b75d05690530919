"""The balanced sampler: every optimizer step sees the same number of rows of every domain (paper: "Training").

Each domain is read in epochs of its own, shuffled anew in each; what a step sees is a function of the seed and the
step's number alone. So a run resumes by counting, and any number of processes shares a step's rows without talking.
The paper's ablation without it is here too: the same over one pool of all rows. Knows row numbers; does not know what
is in the rows.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch.utils.data import Sampler

from ultrafuser.gating.errors import SamplerError


class BalancedBatches(Sampler[list[int]]):
    """One process's share of all micro-batches of a run, in order; a batch sampler for a `DataLoader`.

    Args:
        domains: row numbers of every domain.
        rows_per_domain: rows of each domain in one optimizer step, over all processes.
        micro_rows_per_domain: rows of each domain in one forward pass of one process.
        num_steps: optimizer steps of the run.
        seed: shuffles.
        rank: this process.
        num_processes: all processes.
    """

    def __init__(
        self,
        domains: Mapping[str, Sequence[int]],
        *,
        rows_per_domain: int,
        micro_rows_per_domain: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        empty = [name for name, rows in domains.items() if not rows]
        if empty or not domains:
            raise SamplerError(f"domain {empty[0] if empty else '(none)'!r}: has no rows; add rows of it")
        together = micro_rows_per_domain * num_processes
        if rows_per_domain % together:
            raise SamplerError(
                f"rows_per_domain: {rows_per_domain} rows of a step cannot be shared by {num_processes} processes with"
                f" {micro_rows_per_domain} rows at a time; use a multiple of {together}"
            )
        self._domains = {name: list(rows) for name, rows in domains.items()}
        self._rows_per_domain = rows_per_domain
        self._micro_rows = micro_rows_per_domain
        self._num_steps = num_steps
        self._seed = seed
        self._rank = rank
        self._num_processes = num_processes
        self._order = lru_cache(maxsize=4 * len(domains))(self._shuffled)

    @property
    def micro_batches_per_step(self) -> int:
        """Forward passes of one process in one optimizer step: the gradient accumulation."""
        return self._rows_per_domain // (self._micro_rows * self._num_processes)

    def __len__(self) -> int:
        return self._num_steps * self.micro_batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        return (self.micro_batch(number) for number in range(len(self)))

    def micro_batch(self, number: int) -> list[int]:
        """Rows of this process's micro-batch, counted from the start of the run: domain after domain."""
        begin = (number * self._num_processes + self._rank) * self._micro_rows
        return [
            self._row(name, position) for name in self._domains for position in range(begin, begin + self._micro_rows)
        ]

    def epochs(self, step: int) -> dict[str, float]:
        """How often each domain's rows have been seen when `step` steps are done."""
        return {name: step * self._rows_per_domain / len(rows) for name, rows in self._domains.items()}

    def _row(self, domain: str, position: int) -> int:
        epoch, index = divmod(position, len(self._domains[domain]))
        return self._domains[domain][self._order(domain, epoch)[index]]

    def _shuffled(self, domain: str, epoch: int) -> list[int]:
        digest = hashlib.sha256(f"{self._seed}:{domain}:{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(len(self._domains[domain]), generator=generator).tolist()


class ProportionalBatches(BalancedBatches):
    """The same number of rows in a step, drawn from all domains together: a domain's share is that of its rows.

    Arguments as of `BalancedBatches`; an epoch is one of the union.
    """

    _POOL = "all domains"

    def __init__(self, domains: Mapping[str, Sequence[int]], **options: int) -> None:
        super().__init__(domains, **options)
        self._names = tuple(domains)
        self._domains = {self._POOL: [row for rows in domains.values() for row in rows]}
        self._rows_per_domain *= len(domains)
        self._micro_rows *= len(domains)

    def epochs(self, step: int) -> dict[str, float]:
        """Of the union, for every domain: what is to be expected of it, and exact at the end of an epoch."""
        return dict.fromkeys(self._names, super().epochs(step)[self._POOL])
