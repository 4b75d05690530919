"""Data as `--data` names it: files of conversations, and data sets of the Hugging Face hub, which become such files.

    [DOMAIN=]hub:ORG/NAME[@REVISION][,config=NAME][,split=NAME][,messages=COLUMN | ,prompt=COLUMN,response=COLUMN]

The rows of a data set are streamed once, by `datasets`, into a file of the cache: whoever reads them reads a file, with
its lines, its digest and its checks. Does not know what rows are read for.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.gating.data.conversations import DataFile, check_domain
from ultrafuser.gating.errors import DataError
from ultrafuser.gating.files import new_lines
from ultrafuser.gating.model.cache import Artifact, Report, Tick, build_once

if TYPE_CHECKING:
    from datasets import IterableDataset

SCHEME = "hub:"

# Part of the cache key: raise it when the same rows of the hub are to give another file.
_RECIPE = 1

_WAY_OUT = (
    "give [DOMAIN=]hub:ORG/NAME[@REVISION][,config=NAME][,split=NAME], then ,messages=COLUMN or"
    " ,prompt=COLUMN,response=COLUMN"
)
_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WORD = re.compile(r"[\w.-]+")
_COLUMNS = ({"messages"}, {"prompt", "response"})

# The roles of ShareGPT's form of a message, {"from": "human", "value": ...}.
_ROLES = {"human": "user", "gpt": "assistant"}


def open_data(
    arguments: Sequence[str], cache_dir: Path, limit: int | None = None, on_progress: Report | None = None
) -> list[DataFile]:
    """The files that `--data` names, those of the hub fetched into the cache unless they are there.

    Args:
        arguments: FILE, DOMAIN=FILE, or data sets of the hub.
        cache_dir: where their rows are kept.
        limit: of a data set whose domain is named so many rows are fetched, the first ones.
        on_progress: told what is being done.

    Raises:
        DataError: one cannot be read, or lacks a column; all are looked at before rows of any are fetched.
    """
    sources = [_HubRows.parse(argument, limit) or DataFile.parse(argument) for argument in arguments]
    for source in sources:
        if isinstance(source, _HubRows) and not source.artifact.is_built(cache_dir):
            assert source.dataset is not None
    report = on_progress or (lambda label, share: None)
    return [source.file(cache_dir, report) if isinstance(source, _HubRows) else source for source in sources]


@dataclass(frozen=True)
class _HubRows:
    """One split of a data set, as it was asked for."""

    repo: str
    revision: str
    options: Mapping[str, str]
    """Of `config`, `split`, and the columns, those that were given."""

    domain: str | None
    limit: int | None

    @classmethod
    def parse(cls, argument: str, limit: int | None) -> "_HubRows | None":
        """None if the argument does not name a data set of the hub.

        Raises:
            DataError: it does, and not in the form that is read.
        """
        domain, equals, rest = ("", "", argument) if argument.startswith(SCHEME) else argument.partition("=")
        if not rest.startswith(SCHEME):
            return None
        if equals:
            check_domain(domain)
        name, *pairs = rest.removeprefix(SCHEME).split(",")
        match = _NAME.fullmatch(name)
        if match is None:
            raise DataError(f"{argument:.200}: {name!r:.100} is no name of a data set; {_WAY_OUT}")
        options: dict[str, str] = {}
        for key, _, value in (pair.partition("=") for pair in pairs):
            if key not in ("config", "split", "messages", "prompt", "response") or key in options or not value:
                raise DataError(
                    f"{argument:.200}: {key!r:.100} is unknown, there twice, or without a value; {_WAY_OUT}"
                )
            options[key] = value
        if options.keys() & set.union(*_COLUMNS) not in (set(), *_COLUMNS):
            raise DataError(f"{argument:.200}: name one column of messages, or two: prompt and response; {_WAY_OUT}")
        for key in options.keys() & {"config", "split"}:
            if not _WORD.fullmatch(options[key]):
                raise DataError(f"{argument:.200}: {key}: {options[key]!r:.100} is no name; {_WAY_OUT}")
        # Which domains there are shows at the end only: rows that name their own are read to it.
        return cls(match["repo"], match["revision"] or "main", options, domain or None, limit if domain else None)

    @property
    def split(self) -> str:
        return self.options.get("split", "train")

    @property
    def columns(self) -> list[str]:
        """That are read: of messages, or of prompt and response."""
        if "prompt" in self.options:
            return [self.options["prompt"], self.options["response"]]
        return [self.options.get("messages", "messages")]

    @property
    def origin(self) -> str:
        """What it is called in messages and manifests, which says what was read."""
        return ",".join([f"{SCHEME}{self.repo}@{self.commit}", *(f"{key}={own}" for key, own in self.options.items())])

    @cached_property
    def commit(self) -> str:
        """The commit of the revision; a branch may be at another one tomorrow."""
        from huggingface_hub import HfApi

        if _COMMIT.fullmatch(self.revision):
            return self.revision
        with self._told():
            commit = HfApi().dataset_info(self.repo, revision=self.revision).sha
            assert commit is not None
            return commit

    @cached_property
    def dataset(self) -> "IterableDataset":
        """The split with the columns that are read, at its first row.

        Raises:
            DataError: it cannot be read, or lacks a column.
        """
        from datasets import load_dataset_builder

        with self._told():
            # The scheme, so that no folder of that name is taken for it.
            path = f"hf://datasets/{self.repo}"
            builder = load_dataset_builder(path, self.options.get("config"), revision=self.commit)
            if builder.hash != self.commit:  # `datasets` takes what it finds in its cache when the hub fails
                raise DataError(f"{self.origin}: cannot be fetched now; try again")
            dataset = builder.as_streaming_dataset(self.split)
            found = list(dataset.column_names or next(iter(dataset), {}))
        domain = [] if self.domain else ["domain"]
        for column in self.columns + domain:
            if column not in found:
                way_out = "name the domain, DOMAIN=hub:..." if column == "domain" else "name one that is there"
                there = ", ".join(found) or "no rows"
                raise DataError(f"{self.origin}: no column {column!r}, there are {there}; {way_out}")
        return dataset.select_columns([*self.columns, *({"domain", "tools"} & set(found))])

    @property
    def artifact(self) -> Artifact:
        """Its rows in the cache."""
        parts = {"recipe": _RECIPE, "origin": self.origin, "has_domain": self.domain is not None, "limit": self.limit}
        return Artifact("hub", f"fetching {self.repo}", parts, self._fetch)

    def file(self, cache_dir: Path, report: Report) -> DataFile:
        """Its rows as a file, fetched now if they are not in the cache."""
        folder = build_once(self.artifact, cache_dir, report)
        return DataFile(folder / self._file_name, self.domain, self.origin)

    @property
    def _file_name(self) -> str:
        names = [self.repo.partition("/")[2], *(self.options[key] for key in ("config",) if key in self.options)]
        return f"{'-'.join([*names, self.split])}.jsonl"

    def _fetch(self, folder: Path, tick: Tick) -> None:
        splits = self.dataset.info.splits or {}
        total = splits[self.split].num_examples if self.split in splits else None
        total = min((number for number in (total, self.limit) if number), default=None)
        with self._told(), new_lines(folder / self._file_name) as lines:
            for number, row in enumerate(islice(self.dataset, self.limit)):
                lines.write(f"{json.dumps(self._row(row), ensure_ascii=False, default=lambda _: None)}\n".encode())
                tick(min(number / total, 1.0) if total else 0.0)

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the data set as a row of a file; what does not fit is found there, with its line."""
        values = [row[column] for column in self.columns]
        if len(values) == 2:
            roles = ("user", "assistant")
            messages = [{"role": role, "content": content} for role, content in zip(roles, values, strict=True)]
        else:
            messages = [_message(own) for own in values[0]] if isinstance(values[0], list) else values[0]
        rest = {} if self.domain else {"domain": row["domain"]}
        return rest | {"messages": messages} | ({"tools": row["tools"]} if row.get("tools") else {})

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever goes wrong on the way to the hub is one line."""
        from datasets import config
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        name = f"{SCHEME}{self.repo}@{self.revision}"
        if config.HF_HUB_OFFLINE:
            raise DataError(
                f"{name}: cannot be fetched, as HF_HUB_OFFLINE is set; fetch it without, once and by its commit, or"
                " name a file"
            )
        try:
            yield
        except DataError:
            raise
        except GatedRepoError as error:
            raise DataError(f"{name}: its owner has to let you in; ask on the hub, and set HF_TOKEN") from error
        except RevisionNotFoundError as error:
            raise DataError(f"{name}: no such revision; name a branch, a tag or a commit of it") from error
        except RepositoryNotFoundError as error:
            raise DataError(f"{name}: no such data set, or a private one; correct the name, or set HF_TOKEN") from error
        except Exception as error:  # the hub's client raises many kinds, of several libraries
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(
                f"{name}: cannot be read from the hub ({reason:.300}); correct it, or name a file"
            ) from error


def _message(message: Any) -> Any:
    """A message as files have it: without keys that only other rows use, which Arrow fills with nulls."""
    if not isinstance(message, Mapping):
        return message
    if "role" not in message and "from" in message:
        role = message["from"]
        return {"role": _ROLES.get(role, role), "content": message.get("value")}
    return {key: value for key, value in message.items() if value is not None}
