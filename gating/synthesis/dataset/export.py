"""From a run's folder to a data set: duplicates and test questions left out, files, a report and a data card.

The folder is one that Hugging Face `datasets` loads as it is, and its files are the training format. Knows the store's
conversations; asks nobody.
"""

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ultrafuser.gating.commands.places import output_folder
from ultrafuser.gating.commands.provenance import PROVENANCE_FILE, collect_provenance
from ultrafuser.gating.commands.run_folder import SETTINGS_FILE, sole_run
from ultrafuser.gating.data.decontamination import RUN, Hit, Index, TestSet, parse_test_sets
from ultrafuser.gating.data.duplicates import find_duplicates
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.files import file_digest, new_lines, read_json, write_file, write_json
from ultrafuser.gating.progress_bar import counting_bar
from ultrafuser.gating.synthesis.dataset.card import render_card
from ultrafuser.gating.synthesis.dataset.statistics import Statistics, load_counter
from ultrafuser.gating.synthesis.dataset.training_rows import Row, conversations
from ultrafuser.gating.synthesis.settings import ExportSettings, Turns
from ultrafuser.gating.synthesis.stages.records import draw, identify
from ultrafuser.gating.synthesis.stages.store import Store

DATASET_FOLDER = "dataset"
TRAIN, VALIDATION = "train", "validation"
DECONTAMINATION_FILE = "decontamination.json"
STATISTICS_FILE = "statistics.json"


class _Plan(BaseModel):
    """What is needed of a run's settings, whatever else they are."""

    domains: tuple[str, ...]
    turns: Turns
    strong: int
    weak: int
    complex_share: float


@dataclass
class Left:
    """What became of the rows."""

    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    """Numbers by domain and reason."""

    hits: list[dict[str, Any]] = field(default_factory=list)
    """Rows that share a run with a test set."""

    def drop(self, row: Row, reason: str) -> None:
        self.dropped.setdefault(row.domain, Counter())[reason] += 1

    def drop_hit(self, row: Row, hit: Hit) -> None:
        """Count a contaminated row, and keep what it shares."""
        self.drop(row, f"contaminated by {hit.test_set}")
        self.hits.append({"id": row.id, "domain": row.domain, **asdict(hit)})


def export(settings: ExportSettings) -> Path:
    """Write the data set; returns its folder, which replaces an older one file by file.

    Raises:
        CommandError: a folder without conversations, or in use; a test set that cannot be read.
    """
    folder = Path(settings.output).expanduser()
    structure = _structure(folder)
    target = output_folder(folder / DATASET_FOLDER, "output")
    index = Index(_test_sets(settings))
    _check_structure(folder, structure)
    count = load_counter(settings.tokenizer)
    paths = {split: target / "data" / f"{split}.jsonl.gz" for split in (TRAIN, VALIDATION)}
    left = Left()
    statistics = {split: Statistics(count) for split in paths}
    with sole_run(folder), Store(folder) as store, ExitStack() as stack:
        duplicates = _duplicates(store, structure["turns"], settings.duplicate_threshold)
        files = {split: stack.enter_context(new_lines(path)) for split, path in paths.items()}
        total = len(store.ids("responses"))
        bar = stack.enter_context(counting_bar("export", total, "conversation"))
        for row in conversations(store, structure["turns"]):
            bar.update()
            if row.id in duplicates:
                left.drop(row, duplicates[row.id])
            elif hit := next(filter(None, (index.find(message.content) for message in row.messages)), None):
                left.drop_hit(row, hit)
            else:
                split = _split_of(row, settings.validation_share)
                files[split].write(f"{json.dumps(row.model_dump(), ensure_ascii=False)}\n".encode())
                statistics[split].add(row)
    for split in paths:
        if not statistics[split].num_rows:
            paths[split].unlink()
    if not statistics[TRAIN].num_rows:
        raise CommandError(f"{folder}: no conversation is left for training; see {folder / 'report.json'}")
    _write_reports(target, settings, structure, left, statistics)
    return target


def _structure(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise CommandError(f"{folder}: no folder of `ultrafuser data make`; name the one it wrote")
    return read_json(path, "name the folder of another run")


def _test_sets(settings: ExportSettings) -> list[TestSet]:
    """Reports have a key for each, beside those of the data set's own files."""
    return parse_test_sets(settings.test_set, [f"{split}.jsonl.gz" for split in (TRAIN, VALIDATION)])


def _check_structure(folder: Path, structure: dict[str, Any]) -> None:
    try:
        _Plan.model_validate(structure)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CommandError(f"{folder / SETTINGS_FILE}: {reason}; name the folder of another run") from error


def _duplicates(store: Store, num_turns: int, threshold: float) -> dict[str, str]:
    """Conversations that begin as another does; of those, related instructions go first."""
    rows = sorted((bool(row.relation), row.id, row.messages[0].content) for row in conversations(store, num_turns))
    with counting_bar("duplicates", len(rows), "conversation") as bar:
        return find_duplicates(((identity, text) for _, identity, text in rows), threshold, bar.update)


def _split_of(row: Row, validation_share: float) -> str:
    """Whole sub-topics, so that no instruction is near to one of the other split."""
    drawn = draw(identify(row.domain, row.meta_topic, row.sub_topic), VALIDATION)
    return VALIDATION if drawn < validation_share else TRAIN


def _write_reports(
    target: Path,
    settings: ExportSettings,
    structure: dict[str, Any],
    left: Left,
    statistics: dict[str, Statistics],
) -> None:
    test_sets = _test_sets(settings)
    digests = {test_set.name: file_digest(test_set.path) for test_set in test_sets}
    files = {path.name: file_digest(path) for path in sorted((target / "data").glob("*.jsonl.gz"))}
    dropped = {domain: dict(reasons) for domain, reasons in sorted(left.dropped.items())}
    write_json(
        target / DECONTAMINATION_FILE,
        {"run_words": RUN, "test_sets_sha256": digests, "num_dropped": len(left.hits), "dropped": left.hits},
    )
    provenance = collect_provenance(settings.model_dump(mode="json"), {**digests, **files}, None)
    write_json(target / PROVENANCE_FILE, {**provenance, "structure": structure})
    tables = {split: own.table() for split, own in statistics.items() if own.num_rows}
    splits = {split: own.as_json() for split, own in statistics.items()}
    write_json(target / STATISTICS_FILE, {"splits": splits, "dropped": dropped})
    described = [f"{own.name} (SHA-256 {file_digest(own.path)[:16]})" for own in test_sets]
    card = render_card(settings.license, structure, tables, dropped, described)
    write_file(target / "README.md", card.encode())
