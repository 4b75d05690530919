"""Settings of an evaluation: one frozen model, from which the command line is laid out.

Knows names, types, texts and what needs what. Imports no torch, so that `--help` answers at once.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from ultrafuser.gating.commands.address import check_endpoint
from ultrafuser.gating.commands.fields import (
    CacheFolder,
    CommandSettings,
    Connections,
    Count,
    Positive,
    Precision,
    Seed,
)
from ultrafuser.gating.commands.flags import parse_command
from ultrafuser.gating.errors import CommandError


class EvalSettings(CommandSettings):
    """One evaluation: losses, fusion files to compare, benchmarks of a server, or several of these."""

    fusion: str | None = None
    """Fusion file, folder or preset; for --loss and --variants."""

    loss: bool = False
    """Take the loss on conversations, per domain, of the fused model and all that it is held against."""

    data: tuple[str, ...] = ()
    """Conversations for --loss: JSON lines, also gzipped, FILE or DOMAIN=FILE, or a data set of the hub,
    hub:ORG/NAME@REVISION. Several may follow."""

    gates: tuple[str, ...] = ()
    """Other gates of the fusion's specialists whose rows are added and held against its own: a gate's file, or the
    output folder of a training, PATH or NAME=PATH. Several may follow."""

    mixed_turns: Annotated[int, Field(ge=1, le=2**20)] | None = None
    """With --loss, also on so many conversations of two turns, made of rows of two domains each; the domains must be
    called as the specialists, each of which is taken alone on the turns of its own."""

    baseline: str | None = None
    """A second fusion whose rows are added: the specialists as they entered stage 2, for one."""

    base: str | None = None
    """Folder or hub id of the model that the specialists were made from; default: the one they all name."""

    task_arithmetic_scale: Annotated[float, Field(gt=0, le=100)] = 0.4
    """Of task arithmetic: base + scale x sum of the specialists' differences from it; default: 0.4, untuned."""

    json_file: Annotated[str | None, Field(alias="json")] = None
    """Write the losses to this file as JSON."""

    variants: str | None = None
    """Write one fusion file for each single model of the table into this folder, to be served and compared."""

    benchmark: tuple[str, ...] = ()
    """Benchmarks to ask of a running server: NAME=FILE, or NAME for the hub's copy. Several may follow."""

    output: str | None = None
    """Folder for a benchmark's answers and scores; the same command goes on where it was stopped."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """The server's OpenAI API, for --benchmark."""

    model: str | None = None
    """Model to ask; default: the first that the server names."""

    api_key: str | None = None
    """Key that the server wants."""

    chain_of_thought: bool = False
    """Append "Let's think step by step." to questions of mathematics, as the paper does."""

    execute_code: bool = False
    """Run what the model wrote for HumanEval and MBPP, within limits; this is no security boundary."""

    concurrency: Connections = 16
    """Requests at a time."""

    max_tokens: Count = 512
    """Most tokens of an answer."""

    timeout_seconds: Positive = 600.0
    """After which an answer counts as missing."""

    limit: Count | None = None
    """Most rows of a domain, or items of a benchmark, drawn at random; default: all."""

    max_length: Count | None = None
    """Most tokens of a conversation; default: the fusion's."""

    precision: Precision = "auto"
    """Type of the models' arithmetic for --loss. Auto: bfloat16 on a GPU, else float32."""

    batch_size: Count = 4
    """Conversations that a model reads at a time."""

    seed: Seed = 0
    """Draws rows and items."""

    cache: CacheFolder = None

    @model_validator(mode="after")
    def _check(self) -> "EvalSettings":
        if not (self.loss or self.variants or self.benchmark):
            raise CommandError(
                "loss: nothing to do; add --loss with --data, --variants FOLDER, or --benchmark NAME=FILE"
            )
        if self.fusion is None and (self.loss or self.variants):
            raise CommandError("loss: which fusion? Name a fusion file, folder or preset first")
        if self.fusion is not None and not (self.loss or self.variants):
            raise CommandError("benchmark: a running server is asked, not a fusion; leave the fusion out")
        if self.loss and not self.data:
            raise CommandError("data: --loss needs conversations; add --data DOMAIN=FILE")
        for name in ("gates", "mixed_turns"):
            if getattr(self, name) and not self.loss:
                raise CommandError(f"{name}: is for the loss; add --loss with --data")
        if self.benchmark and self.output is None:
            raise CommandError("output: answers are kept in a folder; add --output FOLDER")
        if self.benchmark:
            check_endpoint(self.base_url, self.api_key)
        return self

    @property
    def output_folder(self) -> Path:
        """Of benchmarks."""
        assert self.output is not None
        return Path(self.output).expanduser()


parse_settings = partial(
    parse_command,
    EvalSettings,
    prog="ultrafuser eval",
    usage="(FUSION --loss --data FILE ... | FUSION --variants FOLDER | --benchmark NAME=FILE ... --output FOLDER)",
    description="Hold a fused model against its specialists, their base and merged weights; or ask a server.",
    positional="fusion",
)
"""Reads the command line of `ultrafuser eval`, as `parse_command` does."""
