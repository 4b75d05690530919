"""Runs of `ultrafuser data make` in this process, and what they leave."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tests.gating.evaluation.endpoint import Endpoint
from ultrafuser.gating.synthesis.make import Ending, make
from ultrafuser.gating.synthesis.settings import MakeSettings
from ultrafuser.gating.synthesis.stages.domain import load_domain
from ultrafuser.gating.synthesis.stages.records import Record
from ultrafuser.gating.synthesis.stages.store import Store


def settings_of(folder: Path, endpoint: Endpoint | None = None, **changes: Any) -> MakeSettings:
    """Settings of a tiny run: 2 domains x 2 meta-topics x 2 sub-topics x 2 x (1 + 1 + 1) instructions."""
    options: dict[str, Any] = {
        "output": str(folder),
        "domain": ("text", "code"),
        "base_url": endpoint.base_url if endpoint else "http://127.0.0.1:9/v1",
        "concurrency": 8,
        "meta_topics": 2,
        "sub_topics": 2,
        "instructions": 2,
        "strong": 1,
        "weak": 1,
    }
    return MakeSettings(**(options | changes))


def run(settings: MakeSettings) -> Ending:
    return asyncio.run(make(settings, settings.structure()))


def records_of(folder: Path) -> dict[str, Record]:
    """All records by id; every id is there once."""
    lines = [line for path in folder.glob("*/?????.jsonl") for line in path.read_text().splitlines()]
    ids = Counter(json.loads(line)["id"] for line in lines)
    assert ids.total() == len(ids), "made twice"
    return {record.id: record for record in map(Record.model_validate_json, lines)}


def contents_of(folder: Path) -> dict[str, tuple[str, ...]]:
    """The texts of all records, by id."""
    return {identity: tuple(item.text for item in record.items) for identity, record in records_of(folder).items()}


def misses_of(folder: Path) -> Counter[str]:
    """Calls that made nothing, by reason."""
    with Store(folder) as store:
        return Counter(miss.reason for miss in store.misses)


def write_domain(path: Path, **changes: Any) -> Path:
    """A domain of one's own: the shipped one for text, with changes."""
    content = load_domain("text").model_dump(mode="json")
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path
