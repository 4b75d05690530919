"""The items of a benchmark, from a file of JSON lines or from the Hugging Face hub, and a fair sample of them.

Knows rows, not prompts or scores. The hub is reached through `datasets`, which is imported only then.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ultrafuser.gating.errors import DataError
from ultrafuser.gating.evaluation.benchmarks.items import Benchmark, HubSource, Item, Row
from ultrafuser.gating.files import file_digest, read_json_lines


def load_items(benchmark: Benchmark, path: Path | None, *, chain_of_thought: bool) -> list[Item]:
    """All items of a benchmark, in the order of its rows.

    Args:
        benchmark: which one.
        path: JSON lines with the benchmark's own fields, gzipped if the name ends in `.gz`; None asks the hub.
        chain_of_thought: as in `Benchmark.read`.

    Raises:
        DataError: a row without a field (file, line, field), two rows of one id, no rows, or no hub.
    """
    rows = _hub_rows(benchmark.hub) if path is None else _file_rows(path)
    items: dict[str, Item] = {}
    for row in rows:
        item = benchmark.read(row, chain_of_thought)
        if item.id in items:
            raise DataError(f"{row.source}:{row.number}: a row {item.id!r} came before; keep one of them")
        items[item.id] = item
    if not items:
        raise DataError(f"{benchmark.name}: {path or benchmark.hub.path} has no rows; give another file")
    return list(items.values())


def data_identity(benchmark: Benchmark, path: Path | None) -> str:
    """What tells two sources of a benchmark's rows apart: a file's SHA-256, or the hub's name."""
    return f"sha256:{file_digest(path)}" if path is not None else f"hub:{benchmark.hub.path}"


def draw_sample(items: Sequence[Item], limit: int | None, seed: int, name: str) -> list[Item]:
    """At most `limit` items, drawn at random by their ids: the same ones for every model, so that runs are paired."""
    if limit is None or limit >= len(items):
        return list(items)
    ranks = {item.id: hashlib.sha256(f"{seed}:{name}:{item.id}".encode()).digest() for item in items}
    chosen = set(sorted(ranks, key=ranks.__getitem__)[:limit])
    return [item for item in items if item.id in chosen]


def _file_rows(path: Path) -> Iterator[Row]:
    for number, content in read_json_lines(path):
        if not isinstance(content, dict):
            raise DataError(f"{path.name}:{number}: not a JSON object; give one JSON object a line")
        yield Row(content, path.name, number)


def _hub_rows(hub: HubSource) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        if hub.data_files is not None:
            rows = load_dataset("json", data_files=f"hf://datasets/{hub.path}/{hub.data_files}", split="train")
        else:
            rows = load_dataset(hub.path, hub.config, split=hub.split)
    except Exception as error:  # the hub's client raises many kinds, of several libraries
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{hub.path}: cannot be read from the hub ({reason:.200}); give a file: NAME=FILE") from error
    for number, content in enumerate(rows, start=1):
        yield Row(hub.convert(content), hub.path, number)
