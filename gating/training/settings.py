"""Settings of a training run: one frozen model, from which the command line is laid out.

Knows names, types, texts and what excludes what. Imports no torch, so that `--help` answers at once.
"""

import os
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ultrafuser.gating.commands.config_file import parse_configured
from ultrafuser.gating.commands.fields import (
    Amount,
    CacheFolder,
    CommandSettings,
    Count,
    NotNegative,
    Precision,
    Seed,
)
from ultrafuser.gating.errors import GateError, TrainError
from ultrafuser.gating.model.gate_kind import GateKind

Rate = Annotated[float, Field(gt=0, le=1000)]
Rows = Annotated[int, Field(ge=1, le=2**20)]
Rank = Annotated[int, Field(ge=1, le=2**16)]

# The paper's, for three 13B models on 16 GPUs: steps and rows per domain of each stage.
PAPER_STEPS = {1: 400, 2: 5000}
PAPER_ROWS_PER_DOMAIN = {1: 64, 2: 32}

# Settings of specialists and gate, which are frozen while a draft head learns.
_NOT_OF_DRAFTER = ("learn", "lora_rank", "lora_alpha", "lora_dropout", "gate_learning_rate", "gradient_checkpointing")

_NEWCOMER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*=.+")

# Settings that do not change what is learned: a resumed run may have others.
_FREE_ON_RESUME = frozenset(
    {"config", "resume", "plan", "cache", "output", "keep_checkpoints", "log_every", "report_to"}
)

# What is said of one start, not of the run.
_NOT_OF_CONFIG = {"config", "resume", "plan"}


def _check_gate_kind(text: str) -> str:
    """The kind as it is written in a gate's file: its changes in their order."""
    try:
        return str(GateKind.parse(text))
    except GateError as error:
        raise TrainError(f"gate_kind: {error}") from error


class TrainSettings(CommandSettings):
    """One training run."""

    fusion: Annotated[str, Field(min_length=1)]
    """Fusion file, or the name of a preset, to start from."""

    data: Annotated[tuple[str, ...], Field(min_length=1)]
    """Conversations to train on: JSON lines, also gzipped, FILE or DOMAIN=FILE, or a data set of the hub,
    hub:ORG/NAME@REVISION. Several may follow."""

    config: str | None = None
    """YAML file of settings by the names of their flags, which need not be given then; those that are win. A run writes
    its own into its output folder, run/config.yaml."""

    output: Annotated[str, Field(min_length=1)]
    """Folder for the trained fusion, its checkpoints and its log."""

    stage: Literal[1, 2] | None = None
    """1: the gate learns, specialists are frozen. 2: gate and specialists learn together."""

    specialist: str | None = None
    """Instead of a stage: train this specialist alone, in its own template, by a low-rank adapter."""

    drafter: bool = False
    """Instead of a stage: train a draft head, on rows whose responses the fused model itself has given."""

    add: str | None = None
    """Stage 1 with one specialist more: NAME=SOURCE, a fusion that has it (as made by --specialist) or a model. What of
    the gate is the newcomer's alone learns, or all of the gate where nothing is."""

    eval_data: tuple[str, ...] = ()
    """Conversations to evaluate on during training; as data."""

    eval_every: Count | None = None
    """Steps between evaluations; default: a tenth of the run. Evaluation also opens and closes a run."""

    early_stopping_patience: Count | None = None
    """End when this many evaluations in a row have not lowered the mean of the domains' losses; the result is then the
    best model that was evaluated, not the last. Needs --eval-data and --eval-every. Default: all steps are made."""

    learn: Literal["lora", "full"] = "lora"
    """How specialists learn in stage 2: a low-rank adapter each, or all of their parameters."""

    steps: Count | None = None
    """Optimizer steps; default: the paper's (400 in stage 1; else, a draft head's too, 5000)."""

    rows_per_domain: Rows | None = None
    """Rows of every domain in one optimizer step, over all devices; default: the paper's (64 in stage 1; else, a
    draft head's too, 32)."""

    sampling: Literal["balanced", "proportional"] = "balanced"
    """Rows of a step: as many of every domain, or (an ablation) as many in all, each row of the data equally likely."""

    micro_rows_per_domain: Count | None = None
    """Rows of every domain in one forward pass of one device; default: all at once. Lower it to save memory."""

    learning_rate: Rate = 2e-5
    """Highest learning rate, from which a cosine falls to zero. The default is the paper's, for 13B models."""

    gate_learning_rate: Rate | None = None
    """The gate's own learning rate in stage 2; default: the same."""

    warmup_steps: NotNegative = 0
    """Steps in which the learning rate rises from zero."""

    weight_decay: Amount = 0.0
    """AdamW's weight decay."""

    max_grad_norm: Amount = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""

    lora_rank: Rank = 8
    """Rank of new adapters; one that the fusion already names keeps its own."""

    lora_alpha: Count | None = None
    """Scale of new adapters is alpha over rank; default: twice the rank."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped while it learns."""

    max_length: Count | None = None
    """Most tokens of a conversation; longer ones lose their end, never a response's start. Default: the fusion's."""

    limit: Count | None = None
    """Most rows of a domain to train on, drawn at random; default: all."""

    eval_limit: Count | None = None
    """Most rows of a domain to evaluate on, drawn at random but the same for every seed; default: all."""

    domains: tuple[str, ...] = ()
    """Domains to train on, each of which must have rows; default: all that the data names."""

    precision: Precision = "auto"
    """Type of the specialists' arithmetic; what learns is kept in float32. Auto: bfloat16 on a GPU, else float32."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""

    cache_states: bool = False
    """Stage 1: compute the frozen specialists' hidden states once and keep them on disk."""

    fresh_gate: bool = False
    """Start from an untrained gate although the fusion names one."""

    gate_kind: Annotated[str, AfterValidator(_check_gate_kind)] | None = None
    """What a gate looks at and how it mixes: paper, or changes of it joined by "+" (joint, probabilities, scaled,
    smoothed). Default: the kind of the gate that is there; of a fresh one paper."""

    draft_vocabulary: Count = 8192
    """Tokens that a draft head can guess: the most frequent ones of the responses."""

    draft_tokens: Annotated[int, Field(ge=1, le=16)] = 4
    """How far ahead a draft head learns to guess."""

    draft_window: Annotated[int, Field(ge=1, le=2**20)] = 256
    """Latest tokens of a response that a draft head looks at; in the engine each request has memory for so many."""

    chunk_size: Count = 256
    """Response tokens, or guesses of a draft head, whose logits exist at the same time in the loss."""

    seed: Seed = 0
    """Shuffles, initialises, drops out."""

    save_every: Count | None = None
    """Steps between checkpoints; default: a tenth of the run. The end is always saved."""

    keep_checkpoints: Count = 2
    """How many checkpoints stay on disk."""

    log_every: Count = 10
    """Steps between log lines."""

    report_to: Annotated[tuple[str, ...], Field(min_length=1)] = ("tensorboard",)
    """Trackers that get the log, as Transformers names them: tensorboard, wandb, mlflow, trackio, ..., or none. Several
    may follow. Default: tensorboard."""

    resume: bool = False
    """Go on from the newest checkpoint in the output folder, if there is one."""

    plan: bool = False
    """Say what would be trained, the memory and the steps, and end before any weight is loaded."""

    cache: CacheFolder = None

    @model_validator(mode="before")
    @classmethod
    def _add_in_stage_1(cls, values: Any) -> Any:
        return {"stage": 1, **values} if values.get("add") is not None else values

    @model_validator(mode="after")
    def _check(self) -> "TrainSettings":
        if (self.stage is not None) + (self.specialist is not None) + self.drafter != 1:
            raise TrainError(
                "stage: name either a stage (--stage 1, --stage 2), one specialist (--specialist NAME) or --drafter"
            )
        if self.add is not None:
            self._check_add()
        if self.cache_states and self.stage != 1:
            raise TrainError("cache_states: only stage 1 can cache, as specialists that learn change; leave it out")
        for name in ("fresh_gate", "gate_kind"):
            if getattr(self, name) and self.drafter:
                raise TrainError(f"{name}: a draft head is trained for the gate that the fusion has; leave it out")
        if self.gate_kind is not None and self.specialist is not None:
            raise TrainError("gate_kind: a specialist alone is trained without a gate; leave it out")
        for name in _NOT_OF_DRAFTER if self.drafter else ():
            if name in self.model_fields_set:
                raise TrainError(f"{name}: does nothing beside --drafter, as only the head learns; leave it out")
        if self.early_stopping_patience and not (self.eval_data and self.eval_every):
            raise TrainError(
                "early_stopping_patience: it counts evaluations; say on what and how often (--eval-data, --eval-every)"
            )
        if "none" in self.report_to and len(self.report_to) > 1:
            raise TrainError("report_to: none stands alone; leave it, or the trackers, out")
        if self.specialist is not None and self.learn == "full":
            raise TrainError("learn: a specialist alone is trained by an adapter; leave --learn out")
        return self

    def _check_add(self) -> None:
        if not _NEWCOMER.fullmatch(str(self.add)):
            raise TrainError(
                f"add: {self.add!r:.100} is not NAME=SOURCE; give a name of letters, digits, - and _, and a fusion"
                " or a model"
            )
        if self.stage != 1:
            raise TrainError("add: the gate alone learns to weigh a newcomer; train what comes of it on in stage 2")
        for name in ("fresh_gate", "gate_kind"):
            if getattr(self, name):
                raise TrainError(f"{name}: beside --add the trained gate is what the newcomer joins; leave it out")
        if self.weight_decay:
            raise TrainError("weight_decay: beside --add it would change what is to stay of the gate; leave it out")
        if not self.eval_data:
            raise TrainError(
                "eval_data: --add holds the newcomer against the fusion as it was; name conversations for it"
            )

    @property
    def newcomer(self) -> tuple[str, str]:
        """Its name, and where it is."""
        name, _, source = str(self.add).partition("=")
        return name, source

    @property
    def output_folder(self) -> Path:
        """Of the trained fusion."""
        return Path(os.path.expanduser(self.output))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.steps or PAPER_STEPS[self.stage or 2]

    @property
    def num_rows_per_domain(self) -> int:
        """Rows of every domain in a step."""
        return self.rows_per_domain or PAPER_ROWS_PER_DOMAIN[self.stage or 2]

    def micro_rows(self, num_processes: int) -> int:
        """Rows of every domain that one process computes at a time. Times the domains it is the micro-batch of
        training, and as many rows are evaluated, or read into cached states, at a time."""
        return self.micro_rows_per_domain or max(1, self.num_rows_per_domain // num_processes)

    @property
    def trains_specialists(self) -> bool:
        """Whether they learn; else a gate or a draft head does, over states of theirs."""
        return self.stage != 1 and not self.drafter

    @property
    def reads_cached_states(self) -> bool:
        """Whether hidden states are computed once and kept."""
        return self.cache_states or self.drafter

    @property
    def uses_adapters(self) -> bool:
        """Whether specialists learn by adapters."""
        return self.trains_specialists and self.learn == "lora"

    @property
    def lora(self) -> dict[str, Any]:
        """Rank, alpha and dropout of new adapters, as `add_adapter` takes them."""
        alpha = self.lora_alpha or 2 * self.lora_rank
        return {"rank": self.lora_rank, "alpha": alpha, "dropout": self.lora_dropout}

    @property
    def steps_between_saves(self) -> int:
        return self.save_every or max(1, self.num_steps // 10)

    @property
    def steps_between_evaluations(self) -> int:
        return self.eval_every or max(1, self.num_steps // 10)

    def as_config(self) -> dict[str, Any]:
        """What `--config` needs to start the same run: every setting that has a value, by name."""
        left_out = _NOT_OF_CONFIG | set(_NOT_OF_DRAFTER if self.drafter else ())
        content = self.model_dump(mode="json", exclude=left_out)
        return {name: value for name, value in content.items() if value not in (None, [])}

    def lasting(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the one it continues, as JSON values."""
        content = self.model_dump(mode="json")
        return {name: value for name, value in content.items() if name not in _FREE_ON_RESUME}


parse_settings = partial(
    parse_configured,
    TrainSettings,
    prog="ultrafuser train",
    usage="FUSION --data FILE ... --output FOLDER"
    " (--stage 1 | --stage 2 | --specialist NAME | --drafter | --add NAME=SOURCE --eval-data FILE ...)"
    " [--config FILE]",
    description="Train a fused model's gate, its gate and specialists together, one specialist alone, or a draft head;"
    " or let one specialist more join.",
    positional="fusion",
)
"""Reads the command line of `ultrafuser train`, as `parse_configured` does."""
