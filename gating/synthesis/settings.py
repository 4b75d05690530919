"""The settings of `ultrafuser data make`, `export`, `map` and `clean`."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from ultrafuser.gating.commands.address import check_endpoint
from ultrafuser.gating.commands.fields import (
    Amount,
    CacheFolder,
    CommandSettings,
    Connections,
    Count,
    Positive,
    Precision,
    Seed,
)
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.synthesis.stages.domain import load_domain
from ultrafuser.gating.synthesis.stages.structure import FROM_SETTINGS, Structure

Turns = Annotated[int, Field(ge=0, le=1000)]
Topics = Annotated[int, Field(ge=1, le=10**6)]
Related = Annotated[int, Field(ge=0, le=1000)]
Rate = Annotated[float, Field(ge=0.001)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


class MakeSettings(CommandSettings):
    """One run."""

    output: str
    """Folder of the run; the same command goes on where it was stopped."""

    domain: Annotated[tuple[str, ...], Field(min_length=1)]
    """What to make data for: text, code, math, or YAML files of your own. Several may follow."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """OpenAI API of the server that is asked."""

    model: str | None = None
    """Model to ask; default: the first that the server names."""

    api_key: str | None = None
    """Key that the server wants."""

    dry_run: bool = False
    """Say how many calls, tokens and how much money the rest would take; ask nothing."""

    budget: Amount | None = None
    """Most that all runs in this folder may cost together, in the currency of the prices; default: no limit."""

    prompt_price: Amount = 0.0
    """Price of a million prompt tokens."""

    completion_price: Amount = 0.0
    """Price of a million completion tokens."""

    concurrency: Connections = 64
    """Calls at a time."""

    requests_per_minute: Rate | None = None
    """Most calls a minute; default: no limit."""

    tokens_per_minute: Rate | None = None
    """Most tokens a minute, of prompts and completions; default: no limit."""

    timeout_seconds: Positive = 300.0
    """After which a call is tried again."""

    meta_topics: Topics | None = None
    """Meta-topics of each domain; default: the domain's."""

    sub_topics: Topics | None = None
    """Sub-topics of each meta-topic; default: the domain's."""

    instructions: Topics | None = None
    """Instructions of each sub-topic, before related ones; default: the domain's."""

    strong: Related = 2
    """Instructions strongly related to each of those."""

    weak: Related = 2
    """Instructions weakly related to each of those."""

    complex_share: Share = 0.3
    """Share of all instructions that are rewritten to be more complex."""

    turns: Turns = 0
    """Most further turns of a conversation, with a simulated user."""

    turn_share: Share = 0.5
    """Share of the conversations that get a further turn, each time."""

    duplicate_threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Similarity from which on two instructions count as one: Jaccard, of five characters in a row."""

    temperature: Amount = 1.0
    """Of topics, instructions and user turns."""

    response_temperature: Amount = 0.7
    """Of responses."""

    list_tokens: Count = 4096
    """Most tokens of an answer with topics or instructions."""

    response_tokens: Count = 2048
    """Most tokens of a response; one that is cut off there is rejected."""

    retry_rejected: bool = False
    """Ask again for what was rejected in earlier runs."""

    seed: Seed = 0
    """Part of every id, and so of every call's seed and every draw."""

    @model_validator(mode="after")
    def _check(self) -> "MakeSettings":
        if self.budget is not None and not self.prompt_price + self.completion_price:
            raise CommandError("budget: without prices nothing costs anything; add --prompt-price, --completion-price")
        check_endpoint(self.base_url, self.api_key)
        return self

    @property
    def prices(self) -> Prices:
        return Prices(self.prompt_price, self.completion_price)

    def structure(self) -> Structure:
        """What is to be made.

        Raises:
            CommandError: a domain that does not exist, is wrong, or is named twice.
        """
        names = ("meta_topics", "sub_topics", "instructions")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        domains = tuple(load_domain(name).model_copy(update=changes) for name in self.domain)
        if len({domain.name for domain in domains}) < len(domains):
            raise CommandError("domain: two have the same name; name each once")
        return Structure(domains=domains, **{name: getattr(self, name) for name in FROM_SETTINGS})


class ExportSettings(CommandSettings):
    """One data set."""

    output: str
    """Folder of a run of `ultrafuser data make`; the data set is written into its folder `dataset`."""

    test_set: tuple[str, ...] = ()
    """Test sets whose questions must not be in the data: JSON lines, NAME=FILE. Several may follow."""

    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the sub-topics whose conversations become the validation split."""

    duplicate_threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Similarity from which on two first messages count as one: Jaccard, of five characters in a row."""

    tokenizer: str | None = None
    """Folder or hub id of the tokenizer that the statistics count with; default: words are counted."""

    license: str | None = None
    """Licence that the data card names, as the hub spells it."""


class MapSettings(CommandSettings):
    """One picture."""

    output: str
    """Folder of a run with an exported data set; the picture is written into the data set's folder."""

    fusion: str
    """Fusion file, folder or preset, one of whose specialists reads the conversations."""

    specialist: str | None = None
    """Which one; default: the first."""

    limit: Count = 500
    """Most conversations of a domain, drawn at random."""

    max_length: Count | None = None
    """Most tokens of a conversation; default: the fusion's."""

    precision: Precision = "auto"
    """Type of the specialist's arithmetic. Auto: bfloat16 on a GPU, else float32."""

    seed: Seed = 0
    """Draws conversations, and begins the map."""

    cache: CacheFolder = None


class CleanSettings(CommandSettings):
    """One clean copy of conversations."""

    output: Annotated[str, Field(min_length=1)]
    """New folder for the files, which keep their names."""

    data: Annotated[tuple[str, ...], Field(min_length=1)]
    """Conversations: JSON lines, also gzipped, FILE or DOMAIN=FILE, or a data set of the hub, hub:ORG/NAME@REVISION.
    Several may follow; of conversations alike the first one stays."""

    against: tuple[str, ...] = ()
    """What is evaluated on, whose texts must not be in the data: JSON lines with any fields, FILE or NAME=FILE. Several
    may follow."""

    duplicate_threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Similarity from which on what two users say counts as one: Jaccard, of five characters in a row."""

    cache: CacheFolder = None
