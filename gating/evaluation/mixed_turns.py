"""Conversations of two turns that change their domain: does a gate follow? Held against the turns' own specialists.

Each turn is the first exchange of a row; the specialist of its domain, alone and with the whole conversation before it,
is the oracle of its tokens. Knows files of conversations and readings; does not know the command line.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice, permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ultrafuser.gating.data.conversations import BadRow, DataFile, read_conversations
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.evaluation.held_out import ReadingOptions, ReadingTask
from ultrafuser.gating.evaluation.loss import LossTable, Sums, line, percent, row_sums
from ultrafuser.gating.files import file_digest, write_json_lines
from ultrafuser.gating.model.cache import Artifact, Report, Tick, build_once

ORACLE = "oracle"
PLACES = ("turn 1", "turn 2", "both")

# Part of the cache key: raise it when the same files are to give other conversations.
_RECIPE = 1


def join_turns(
    files: Sequence[DataFile], specialists: Sequence[str], count: int, options: ReadingOptions, on_progress: Report
) -> DataFile:
    """A file of `count` conversations, of all ordered pairs of domains in turn; the same for the options' seed.

    A domain's rows are drawn anew when all have been.

    Raises:
        CommandError: a domain is called as no specialist, there is one domain only, or a specialist is called as a row
            of the table.
    """
    if ORACLE in specialists:
        raise CommandError(f"specialists: {ORACLE!r} is the name of a row of the table; rename the specialist")
    seed = options.seed
    sources = [[file.path.name, file.domain, file_digest(file.path)] for file in files]
    parts = {"recipe": _RECIPE, "files": sources, "specialists": list(specialists), "count": count, "seed": seed}
    build = partial(_write, files, specialists, count, seed)
    folder = build_once(Artifact("turns", "joining turns", parts, build), options.cache_dir, on_progress)
    return DataFile(folder / "turns.jsonl")


def measure_turns(task: ReadingTask) -> LossTable:
    """Losses on the task's joined conversations, in the places of domains the first turns, the second ones and both.

    Of every specialist, of equal weights, of the gates and of the oracle. A conversation whose second turn did not fit
    is left out.

    Raises:
        CommandError: none is left.
    """
    reading = task.read_fusion()
    names = task.loaded.specialist_names
    _, counts = torch.unique_consecutive(reading.responses_N, return_counts=True)
    bounds = [0, *counts.cumsum(0).tolist()]  # of the responses
    firsts = np.searchsorted(bounds, reading.offsets)  # the first response of each row
    rows = np.flatnonzero(np.diff(firsts) == 2)
    if not len(rows):
        raise CommandError("--mixed-turns: no second turn fits; raise --max-length")
    first = firsts[rows]
    sums = {name: row_sums(losses_N, bounds) for name, losses_N in reading.losses.items()}
    labels = task.rows.dataset["domain"][:]
    pairs = {_label(pair): pair for pair in permutations(names, 2)}
    own = [pairs[labels[row]] for row in rows.tolist()]
    turns = {name: (values[first], values[first + 1]) for name, values in sums.items()}
    oracle = [np.array([sums[pair[turn]][at + turn] for pair, at in zip(own, first, strict=True)]) for turn in (0, 1)]
    turns[ORACLE] = (oracle[0], oracle[1])
    tokens = np.diff(np.array(bounds)).astype(np.float64)
    return LossTable(
        {name: _places(*values) for name, values in turns.items()}, _places(tokens[first], tokens[first + 1]), {}
    )


def describe_turns(table: LossTable) -> list[str]:
    """The table as lines of Markdown: losses, and in percent how they differ from the oracle's."""
    lines = ["", line(["nats per response token", *PLACES]), line(["---", *["---:"] * len(PLACES)])]
    for name in table.sums:
        losses, differences = table.interval(name), table.difference(name, ORACLE)
        cells = (
            f"{losses[place][0]:.4f}" + (f", {percent(differences[place])}" if name != ORACLE else "")
            for place in PLACES
        )
        lines.append(line([name, *cells]))
    number = len(table.tokens["both"])
    return [*lines, "", f"{number} conversations of two turns of different domains; differences are from the {ORACLE}"]


def turns_as_json(table: LossTable) -> dict[str, Any]:
    """By row: `loss` with its 95 % interval and `against_oracle`, relative to it, of the first turns, the second ones
    and both."""
    return {
        name: {
            "loss": {place: table.interval(name)[place] for place in PLACES},
            "against_oracle": {place: table.difference(name, ORACLE)[place] for place in PLACES},
        }
        for name in table.sums
    }


def _write(
    files: Sequence[DataFile], specialists: Sequence[str], count: int, seed: int, folder: Path, tick: Tick
) -> None:
    exchanges: dict[str, list[list[dict[str, str]]]] = {}
    for index, file in enumerate(files):
        for _, row, share in read_conversations(file):
            tick((index + share) / len(files))
            if not isinstance(row, BadRow):
                exchanges.setdefault(row.domain, []).append(_first_exchange(row.messages))
    odd = sorted(exchanges.keys() - set(specialists))
    if odd or len(exchanges) < 2:
        raise CommandError(
            f"--mixed-turns: {f'domain {odd[0]!r} is no specialist' if odd else 'there are rows of one domain only'};"
            f" give rows of two or more of the domains {', '.join(specialists)}"
        )
    drawn = {domain: cycle(_shuffled(domain, own, seed)) for domain, own in exchanges.items()}
    chosen = islice(cycle(permutations([name for name in specialists if name in exchanges], 2)), count)
    rows = [{"domain": _label(pair), "messages": [*next(drawn[pair[0]]), *next(drawn[pair[1]])]} for pair in chosen]
    write_json_lines(folder / "turns.jsonl", rows)


def _first_exchange(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The first response and the message that it answers."""
    index = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return list(messages[index - 1 : index + 1])


def _shuffled(domain: str, exchanges: Sequence[list[dict[str, str]]], seed: int) -> list[list[dict[str, str]]]:
    ranks = [hashlib.sha256(f"{seed}:{domain}:{index}".encode()).digest() for index in range(len(exchanges))]
    return [exchanges[index] for index in sorted(range(len(exchanges)), key=ranks.__getitem__)]


def _label(pair: tuple[str, str]) -> str:
    """What the domain of a joined conversation is called."""
    return f"{pair[0]}, then {pair[1]}"


def _places(first: Sums, second: Sums) -> dict[str, Sums]:
    return dict(zip(PLACES, (first, second, first + second), strict=True))
