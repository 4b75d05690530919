"""Evaluates a fused model: `ultrafuser eval`. Held-out loss per domain, or benchmarks through a running server.

Puts the parts of `gating/evaluation/` together. See docs/evaluation.md.
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gating.commands.flags import CommandError, parse_command
from gating.commands.progress_bar import StepProgress
from gating.training.settings import Count, Precision

if TYPE_CHECKING:
    from gating.evaluation.held_out import ReadingOptions
    from gating.evaluation.loss import LossTable
    from gating.model.cache import Report


class EvalSettings(BaseModel):
    """One evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fusion: str | None = None
    """Fusion file, folder or preset; for --loss and --variants."""

    loss: bool = False
    """Take the loss on conversations, per domain, of the fused model and all that it is held against."""

    data: tuple[str, ...] = ()
    """Conversations for --loss: JSON lines, also gzipped; FILE, or DOMAIN=FILE. Several may follow."""

    baseline: str | None = None
    """A second fusion whose rows are added: the specialists as they entered stage 2, for one."""

    base: str | None = None
    """Folder or hub id of the model that the specialists were made from; default: the one they all name."""

    task_arithmetic_scale: Annotated[float, Field(gt=0)] = 0.4
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

    concurrency: Count = 16
    """Requests at a time."""

    max_tokens: Count = 512
    """Most tokens of an answer."""

    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """After which an answer counts as missing."""

    limit: Count | None = None
    """Most rows of a domain, or items of a benchmark, drawn at random; default: all."""

    max_length: Count | None = None
    """Most tokens of a conversation; default: the fusion's."""

    precision: Precision = "auto"
    """Type of the models' arithmetic for --loss. Auto: bfloat16 on a GPU, else float32."""

    batch_size: Count = 4
    """Conversations that a model reads at a time."""

    seed: int = 0
    """Draws rows and items."""

    cache: str | None = None
    """Folder for prepared models, encoded data and hidden states; default: ~/.cache/ultrafuser."""

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
        if self.benchmark and self.output is None:
            raise CommandError("output: answers are kept in a folder; add --output FOLDER")
        return self


parse_settings = partial(
    parse_command,
    EvalSettings,
    prog="ultrafuser eval",
    usage="(FUSION --loss --data FILE ... | FUSION --variants FOLDER | --benchmark NAME=FILE ... --output FOLDER)",
    description="Hold a fused model against its specialists, their base and merged weights; or ask a server.",
    positional="fusion",
)
"""Reads the command line of `ultrafuser eval`, as `parse_command` does."""


def run(argv: Sequence[str], cache: str | None = None) -> int:
    """The command; returns the exit status. `cache` is the default of `--cache`.

    Raises:
        CommandError, FusionError: one line for the user.
    """
    from gating.model.packaged import hidden_bars

    settings = parse_settings(argv, cache)
    if settings.benchmark:
        _ask(settings)
    with closing(StepProgress()) as progress, hidden_bars():
        if settings.variants is not None:
            _write_variants(settings, Path(settings.variants), progress)
        if settings.loss:
            _report(settings, _measure(settings, progress))
    return 0


def _ask(settings: EvalSettings) -> None:
    """Benchmarks through a running server; needs no torch."""
    from gating.evaluation.benchmarks.benchmarks import BenchmarkFile, BenchmarkOptions
    from gating.evaluation.benchmarks.benchmarks import run as run_benchmarks

    chosen = settings.model_dump(include=set(BenchmarkOptions.model_fields))
    run_benchmarks([BenchmarkFile.parse(text) for text in settings.benchmark], BenchmarkOptions(**chosen))


def _measure(settings: EvalSettings, on_progress: "Report") -> "LossTable":
    from gating.data.conversations import DataFile
    from gating.evaluation.held_out import prepare_task
    from gating.evaluation.loss import measure

    options = _reading_options(settings)
    files = [DataFile.parse(file) for file in settings.data]
    names = [name for name in (settings.fusion, settings.baseline) if name is not None]
    tables = []
    for name in names:
        task = prepare_task(name, files, options, on_progress)
        print("\n".join(task.rows.summary()), file=sys.stderr)
        tables.append(measure(task, base=settings.base, scale=settings.task_arithmetic_scale))
    return tables[0] if len(tables) == 1 else tables[0].with_baseline(tables[1])


def _reading_options(settings: EvalSettings) -> "ReadingOptions":
    from gating.evaluation.held_out import ReadingOptions

    chosen = settings.model_dump(include=set(ReadingOptions.__dataclass_fields__))
    return ReadingOptions(cache_dir=_cache_dir(settings), **chosen)


def _cache_dir(settings: EvalSettings) -> Path:
    from gating.model.materialize import DEFAULT_CACHE_DIR

    return Path(settings.cache or DEFAULT_CACHE_DIR).expanduser()


def _report(settings: EvalSettings, table: "LossTable") -> None:
    from gating.commands.provenance import write_json
    from gating.evaluation.loss import describe

    print("\n".join(describe(table)))
    if settings.json_file is not None:
        path = Path(settings.json_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, table.as_json())


def _write_variants(settings: EvalSettings, folder: Path, on_progress: "Report") -> None:
    """One fusion file of a single model for each of the table's rows that is one."""
    from gating.evaluation.merging import find_variants
    from gating.model.fusion import inspect_fusion, load_fusion, save_fusion
    from gating.model.materialize import materialize

    assert settings.fusion is not None
    cache_dir = _cache_dir(settings)
    loaded = load_fusion(settings.fusion)
    prepared = materialize(loaded, cache_dir, on_progress)
    merged, notes = find_variants(
        loaded,
        prepared,
        inspect_fusion(prepared).num_shared_ids,
        base=settings.base,
        scale=settings.task_arithmetic_scale,
        cache_dir=cache_dir,
        on_progress=on_progress,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for model in (*prepared.specialists, *merged):
        changes = {"name": f"{loaded.name}-{model.name}", "specialists": (model,), "gate": None}
        save_fusion(loaded.model_copy(update=changes), folder / f"{model.name}.yaml")
        print(folder / f"{model.name}.yaml")
    for note in notes:
        print(note, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
