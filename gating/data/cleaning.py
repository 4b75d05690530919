"""Conversations without what they should not be trained on: rows that cannot be used, rows that share a run of words
with a test set, rows whose user says what another row's user says. Files in, a folder of files and a report out.

Kept rows are the lines of the files, unchanged. Knows files of conversations; does not know who made them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrafuser.gating.commands.places import check_folder
from ultrafuser.gating.commands.provenance import PROVENANCE_FILE, collect_provenance
from ultrafuser.gating.data.conversations import BadRow, Conversation, DataFile, parse_row
from ultrafuser.gating.data.decontamination import RUN, Index, parse_test_sets
from ultrafuser.gating.data.duplicates import Duplicates
from ultrafuser.gating.errors import CommandError, DataError
from ultrafuser.gating.files import file_digest, new_lines, read_lines, replacing, write_json
from ultrafuser.gating.model.cache import Report

REPORT_FILE = "report.json"
NUM_EXAMPLES = 20
"""Rows that the report names, of each file and reason."""


@dataclass
class Removed:
    """What became of one file's rows."""

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, line: int, reason: str, **found: Any) -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= NUM_EXAMPLES:
            self.examples.append({"line": line, "reason": reason, **found})

    @property
    def kept(self) -> int:
        return self.rows - self.counts.total()

    def first_of(self, file: DataFile) -> str:
        """How many of a file's rows were removed, and the first of them."""
        if not self.examples:
            return "it has none"
        first = self.examples[0]
        why = first.get("why", first["reason"])
        return f"all {self.rows:,} are removed, the first: {file.name}:{first['line']}: {why}"

    def __str__(self) -> str:
        why = ", ".join(f"{number:,} {reason}" for reason, number in sorted(self.counts.items()))
        return f"{self.kept:,} of {self.rows:,} rows kept" + (f"; without {why}" if why else "")


class Cleaner:
    """Decides on rows, one after the other."""

    def __init__(self, index: Index, duplicates: Duplicates) -> None:
        self._index = index
        self._duplicates = duplicates

    def is_kept(self, file: DataFile, line: int, row: Conversation | BadRow, removed: Removed) -> bool:
        """Whether a row stays; if not, it is noted."""
        removed.rows += 1
        if isinstance(row, BadRow):
            removed.add(line, "unusable", why=row.reason)
        elif hit := next(filter(None, map(self._index.find, _texts(row))), None):
            place = f"{hit.test_set}:{hit.line}"
            removed.add(line, f"contaminated by {hit.test_set}", found_in=place, run=hit.run)
        elif repeat := self._duplicates.find(f"{file.name}:{line}", _asked(row)):
            removed.add(line, repeat.reason, of=repeat.of)
        else:
            return True
        return False


def clean(
    files: Sequence[DataFile],
    against: Sequence[str],
    *,
    threshold: float,
    output: Path,
    settings: Mapping[str, Any],
    on_progress: Report,
) -> dict[str, Removed]:
    """Write a folder with a file for each of `files`, of its name, its report and where it comes from.

    Args:
        files: in the order of preference: of rows alike, in whichever files, the first one stays.
        against: test sets, as `TestSet.parse` takes them.
        threshold: as in `Duplicates`.
        output: a folder that is new or empty; it is there whole or not at all.
        settings: of the command, for the provenance.
        on_progress: told what is being done.

    Returns:
        What became of the rows, by the file's name.

    Raises:
        CommandError: a folder that is not empty, a name that is there twice, a file of which nothing would be left, or
            (DataError) a file that cannot be read.
    """
    check_new(output)
    names = [file.path.name for file in files]
    for name in names:
        if names.count(name) > 1 or name in (REPORT_FILE, PROVENANCE_FILE):
            raise DataError(f"{name}: is the name of two files of the output folder; rename one of them")
    test_sets = parse_test_sets(against, [file.name for file in files])
    cleaner = Cleaner(Index(test_sets), Duplicates(threshold))
    result: dict[str, Removed] = {}
    with replacing(output) as partial:
        for file in files:
            result[file.name] = _clean_file(file, cleaner, partial / file.path.name, on_progress)
        report = {
            file.name: {
                "file": file.path.name,
                "sha256": file_digest(partial / file.path.name),
                "rows": own.rows,
                "kept": own.kept,
                "removed": dict(sorted(own.counts.items())),
                "examples": own.examples,
            }
            for file, own in zip(files, result.values(), strict=True)
        }
        write_json(
            partial / REPORT_FILE,
            {
                "duplicate_threshold": threshold,
                "run_words": RUN,
                "test_sets": [own.name for own in test_sets],
                "files": report,
            },
        )
        digests = {file.name: file_digest(file.path) for file in files}
        digests |= {own.name: file_digest(own.path) for own in test_sets}
        write_json(partial / PROVENANCE_FILE, collect_provenance(settings, digests, None))
    return result


def check_new(output: Path) -> None:
    """See that a folder can be made and has nothing in it yet.

    Raises:
        CommandError: it cannot be, or has.
    """
    check_folder(output, "output")
    if not output.name:
        raise CommandError(f"output: {output} is no name that can be given; name a new folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CommandError(f"output: {output} is there and not empty; name a new folder")


def _clean_file(file: DataFile, cleaner: Cleaner, target: Path, on_progress: Report) -> Removed:
    removed = Removed()
    with new_lines(target) as lines:
        for line, text, share in read_lines(file.path):
            on_progress(f"cleaning {file.name}", share)
            if cleaner.is_kept(file, line, parse_row(file, line, text), removed):
                lines.write(text if text.endswith(b"\n") else text + b"\n")
    if not removed.kept:
        raise DataError(f"{file.name}: no row would be left ({removed.first_of(file)}); leave it out, or correct it")
    return removed


def _texts(row: Conversation) -> Iterator[str]:
    """All that a specialist reads in training: what was thought before a response, too."""
    for message in row.messages:
        yield message["content"]
        if "reasoning" in message:
            yield message["reasoning"]


def _asked(row: Conversation) -> str:
    """What the user says, in all turns; a system prompt that many rows share makes none of them a duplicate."""
    return "\n".join(message["content"] for message in row.messages if message["role"] == "user")
