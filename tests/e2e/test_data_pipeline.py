"""The data pipeline against the real server with the demo's models, killed twice on the way."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import NO_SPACES
from tests.e2e.process import ServerProcess
from ultrafuser.gating.data.conversations import Conversation, DataFile, read_conversations
from ultrafuser.gating.synthesis.dataset.export import export
from ultrafuser.gating.synthesis.make import drop_duplicates
from ultrafuser.gating.synthesis.settings import ExportSettings, MakeSettings
from ultrafuser.gating.synthesis.stages.domain import load_domain
from ultrafuser.gating.synthesis.stages.records import Record, identify
from ultrafuser.gating.synthesis.stages.store import Store
from ultrafuser.gating.synthesis.stages.structure import Structure
from ultrafuser.gating.synthesis.stages.tasks import Tasks

NAMES = ("text", "code", "math")
SIZES = {"meta_topics": 4, "sub_topics": 3, "instructions": 1, "strong": 2, "weak": 2}
"""5 instructions for every sub-topic: one, and 4 related to it."""

SHORT = {"topic": 24, "note": 30, "instruction_min": 12, "instruction": 48, "response_min": 1, "response": 2000}
KILL_AT = (40, 110)
"""Records that are there when a run is killed."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Iterator[ServerProcess]:
    """The demo preset, as it is served by default, but for spaces between JSON tokens."""
    log = tmp_path_factory.mktemp("demo-data") / "log"
    server = ServerProcess(
        Path("demo"), log, "--cache", str(model_cache), "--structured-outputs-config", NO_SPACES,
        "--max-num-seqs", "64",
    )  # fmt: skip
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


def write_domains(folder: Path) -> list[str]:
    """The shipped domains with lengths that a small model can keep to, and little to read."""
    paths = []
    for name in NAMES:
        content = load_domain(name).model_dump(mode="json")
        changes = {"description": f"questions on {name}", "guidance": "Answer in a few words.", "limits": SHORT}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}))
        paths.append(str(path))
    return paths


def records_of(folder: Path) -> dict[str, Record]:
    """All whole records by id; none is there twice."""
    lines = [line for path in folder.glob("*/?????.jsonl") for line in path.read_text().split("\n")[:-1]]
    assert len({json.loads(line)["id"] for line in lines}) == len(lines)
    return {record.id: record for record in map(Record.model_validate_json, lines)}


def num_records(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/?????.jsonl"))


def run_until(command: list[str], folder: Path, kill_at: int | None) -> int:
    """Run the command to its end, or kill it when so many records are there; returns the exit status."""
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and (kill_at is None or num_records(folder) < kill_at):
            time.sleep(0.02)
    finally:
        process.kill()
    return process.wait()


@pytest.mark.long
@pytest.mark.timeout(1200)  # about 250 calls of the demo: a loaded machine takes its time
def test_a_run_of_all_stages_that_is_killed_twice_makes_everything_once(server: ServerProcess, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = MakeSettings(
        output=str(folder),
        domain=tuple(write_domains(tmp_path)),
        base_url=f"{server.url}/v1",
        turns=1,
        turn_share=0.15,
        list_tokens=160,
        response_tokens=24,
        duplicate_threshold=1.0,  # a model this small says nearly the same too often
        **SIZES,  # type: ignore[arg-type]
    )
    flags = settings.model_dump(exclude={"output", "domain"}, exclude_defaults=True)
    command = [sys.executable, "-m", "ultrafuser.server", "data", "make", str(folder), "--domain", *settings.domain]
    command += [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    before: dict[str, Record] = {}
    for kill_at in KILL_AT:
        assert run_until(command, folder, kill_at) == -9
        assert before.items() <= records_of(folder).items()
        before = records_of(folder)
        assert len(before) >= kill_at
    assert run_until(command, folder, None) == 0
    records = records_of(folder)
    assert before.items() <= records.items()

    structure = settings.structure()
    with Store(folder) as store:
        dropped = drop_duplicates(store, settings.duplicate_threshold)
        rejected = {miss.id for miss in store.misses}
        for stage in structure.stages:
            left = {task.id for task in Tasks(structure).of(stage, store, dropped)}
            assert left == store.ids(stage) | (left & rejected)
            assert store.ids(stage).isdisjoint(rejected)
        for stage, planned in planned_ids(structure).items():
            assert store.ids(stage) <= planned
        assert len(store.ids("meta_topics")) == 3
        assert len(store.ids("responses")) > 30

    export(ExportSettings(output=str(folder)))
    rows = [row for _, row, _ in read_conversations(DataFile(folder / "dataset" / "data" / "train.jsonl.gz"))]
    assert all(isinstance(row, Conversation) for row in rows)
    assert {row.domain for row in rows} == set(NAMES)


def planned_ids(structure: Structure) -> dict[str, set[str]]:
    """Ids of all calls whose number is not drawn, from the plan alone: what no run that was ended may change."""
    ids: dict[str, set[str]] = {stage: set() for stage in ("meta_topics", "sub_topics", "instructions", "related")}
    ids["responses"] = set()
    for domain in structure.domains:
        (meta,) = _plan(ids, "meta_topics", [identify("domain", domain.name, structure.seed)])
        subs = _plan(ids, "sub_topics", _items(meta, domain.meta_topics))
        topics = [item for call in subs for item in _items(call, domain.sub_topics)]
        first = _plan(ids, "instructions", topics, 0)
        instructions = [item for call in first for item in _items(call, domain.instructions)]
        related = _plan(ids, "related", instructions)
        instructions += [item for call in related for item in _items(call, structure.strong + structure.weak)]
        ids["responses"] |= {identify("responses", "", item) for item in instructions}
    return ids


def _plan(ids: dict[str, set[str]], stage: str, parents: list[str], *place: int) -> list[str]:
    calls = [identify(stage, f"{stage}-1", parent, *place) for parent in parents]
    ids[stage] |= set(calls)
    return calls


def _items(call: str, count: int) -> list[str]:
    return [identify(call, place) for place in range(count)]
