"""Training data: the usable rows of files of conversations, encoded for every specialist, once, in the cache.

The encoded rows are a Hugging Face `datasets.Dataset` on disk, mapped into memory; bad rows stay with it as a report.
Knows no models and no batches.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.gating.data.conversations import BadRow, Conversation, DataFile, read_conversations
from ultrafuser.gating.data.encoding import ConversationEncoder, EncodingError
from ultrafuser.gating.errors import DataError
from ultrafuser.gating.files import file_digest
from ultrafuser.gating.model.cache import Artifact, Report, Tick, build_once

if TYPE_CHECKING:
    from datasets import Dataset

# Part of the cache key: raise it when the same file is to give other rows.
_RECIPE = 2


@dataclass(frozen=True)
class Rows:
    """The usable rows of some files, and what became of the others."""

    dataset: "Dataset"
    """Columns `domain`, `input_ids` [S][T_s], `response_mask` [S][T_s], `num_response_tokens`, `length`, `is_cut`."""

    bad: tuple[BadRow, ...]
    """Rows that were left out."""

    digests: Mapping[str, str]
    """SHA-256 of every file, by name."""

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains with at least one usable row, in alphabetical order."""
        return tuple(sorted(set(self.dataset["domain"][:])))

    def indices(self, domain: str) -> list[int]:
        """Where this domain's rows are in the dataset."""
        return [index for index, own in enumerate(self.dataset["domain"][:]) if own == domain]

    def summary(self) -> list[str]:
        """One line per domain, and the count of bad rows by reason, for people."""
        counts, tokens, cut = Counter[str](), Counter[str](), Counter[str]()
        columns = (self.dataset[column][:] for column in ("domain", "num_response_tokens", "is_cut"))
        for name, number, is_cut in zip(*columns, strict=True):
            counts[name] += 1
            tokens[name] += number
            cut[name] += is_cut
        lines = [
            f"{name}: {counts[name]:,} rows, {tokens[name]:,} response tokens, {cut[name]:,} rows cut at their end"
            for name in self.domains
        ]
        if self.bad:
            lines.append(f"{len(self.bad):,} bad rows left out, the first: {self.bad[0]}")
        return lines


def load_rows(
    files: Sequence[DataFile],
    encoder: ConversationEncoder,
    *,
    key: Mapping[str, object],
    cache_dir: Path,
    domains: Sequence[str] = (),
    on_progress: Report | None = None,
) -> Rows:
    """Read, check and encode all files, or find the result in the cache.

    Args:
        files: at least one.
        encoder: renders and tokenises.
        key: what the encoder's result depends on beside the files (tokenizers, templates, lengths), as JSON values.
        cache_dir: where encoded rows are kept.
        domains: each must have rows; default: those that any row names, a bad one too.

    Raises:
        DataError: a domain without a usable row, or no usable row at all.
    """
    found = [file_digest(file.path) for file in files]
    names = Counter(file.name for file in files)
    digests = {
        file.name if names[file.name] == 1 else f"{file.name} ({digest[:8]})": digest
        for file, digest in zip(files, found, strict=True)
    }
    sources = [[file.name, file.domain, digest] for file, digest in zip(files, found, strict=True)]
    artifact = Artifact(
        name="rows",
        label="encoding conversations",
        parts={"recipe": _RECIPE, "files": sources, **key},
        build=lambda folder, tick: _write(folder, files, encoder, tick),
    )
    folder = build_once(artifact, cache_dir, on_progress or (lambda label, share: None))
    rows = _read(folder, digests)
    _check_domains(rows, domains)
    return rows


def select(rows: Rows, domains: Sequence[str], limit: int | None, seed: int) -> Rows:
    """The rows of some domains, at most `limit` of each, drawn at random but the same for the same seed."""
    chosen = []
    for domain in domains:
        indices = rows.indices(domain)
        if limit is not None and limit < len(indices):
            ranks = {index: hashlib.sha256(f"{seed}:{domain}:{index}".encode()).digest() for index in indices}
            indices = sorted(sorted(indices, key=lambda index: ranks[index])[:limit])
        chosen += indices
    return Rows(rows.dataset.select(chosen), rows.bad, rows.digests)


def _write(folder: Path, files: Sequence[DataFile], encoder: ConversationEncoder, tick: Tick) -> None:
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features(
        domain=Value("string"),
        input_ids=List(List(Value("int32"))),
        response_mask=List(List(Value("bool"))),
        num_response_tokens=Value("int32"),
        length=Value("int32"),
        is_cut=Value("bool"),
    )
    bad: list[BadRow] = []
    with ArrowWriter(features=features, path=str(folder / "rows.arrow")) as writer:
        for index, file in enumerate(files):
            for line, row, share in read_conversations(file):
                tick((index + share) / len(files))
                encoded = row if isinstance(row, BadRow) else _encode(file, line, row, encoder)
                if isinstance(encoded, BadRow):
                    bad.append(encoded)
                else:
                    writer.write(encoded)
        writer.finalize()
    (folder / "bad.json").write_text(json.dumps([asdict(row) for row in bad]), encoding="utf-8")


def _encode(file: DataFile, line: int, row: Conversation, encoder: ConversationEncoder) -> dict[str, Any] | BadRow:
    try:
        return {"domain": row.domain, **asdict(encoder.encode(row.messages))}
    except EncodingError as error:
        return BadRow(file.name, line, row.domain, str(error))


def _read(folder: Path, digests: Mapping[str, str]) -> Rows:
    from datasets import Dataset

    bad = json.loads((folder / "bad.json").read_text(encoding="utf-8"))
    return Rows(Dataset.from_file(str(folder / "rows.arrow")), tuple(BadRow(**row) for row in bad), digests)


def _found(rows: Rows, present: Sequence[str]) -> str:
    """What there is instead of a domain; bad rows may have been of it."""
    bad = f", and {len(rows.bad)} bad rows, the first: {rows.bad[0]}" if rows.bad else ""
    return f"the files have {', '.join(present) or 'none'}{bad}"


def _check_domains(rows: Rows, domains: Sequence[str]) -> None:
    present = set(rows.domains)
    wanted = set(domains) or present | {row.domain for row in rows.bad if row.domain}
    for domain in sorted(wanted - present):
        bad = [row for row in rows.bad if row.domain == domain]
        reason = f"all {len(bad)} are bad, the first: {bad[0]}" if bad else _found(rows, sorted(present))
        raise DataError(f"domain {domain!r}: has no usable rows ({reason}); add rows of it")
    if not present:
        first = f", the first: {rows.bad[0]}" if rows.bad else ""
        raise DataError(f"data: no usable rows ({len(rows.bad)} bad ones{first}); correct the files")
