"""Shows what a gate does: `ultrafuser analyze`. Weights as tables and pictures, tokens in colour, training curves.

Puts the parts of `gating/analysis/` together. See docs/evaluation.md.
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from ultrafuser.gating.commands.fields import CacheFolder, CommandSettings, Count, Precision, Seed
from ultrafuser.gating.commands.flags import parse_command, require
from ultrafuser.gating.commands.places import check_folder
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.files import json_bytes, write_file
from ultrafuser.gating.model.cache import cache_folder

if TYPE_CHECKING:
    from ultrafuser.gating.analysis.transcripts import ShownConversation
    from ultrafuser.gating.analysis.weights import GateReading
    from ultrafuser.gating.evaluation.held_out import ReadingTask
    from ultrafuser.gating.model.cache import Report


class AnalysisSettings(CommandSettings):
    """One analysis."""

    fusion: str | None = None
    """Fusion file, folder or preset whose gate is shown on --data."""

    data: tuple[str, ...] = ()
    """Conversations: JSON lines, also gzipped, FILE or DOMAIN=FILE, or a data set of the hub, hub:ORG/NAME@REVISION.
    Several may follow."""

    run: tuple[str, ...] = ()
    """Output folders of `ultrafuser train` whose curves are drawn over each other: FOLDER, or LABEL=FOLDER; runs with
    the same label look the same. Several may follow."""

    output: Annotated[str, Field(min_length=1)]
    """Folder for tables, pictures and the page; files of the same names are replaced."""

    limit: Count = 50
    """Most conversations of a domain that are read, drawn at random."""

    samples: Count = 3
    """Conversations of a domain that are shown token by token, drawn from those that are read."""

    max_length: Count | None = None
    """Most tokens of a conversation; longer ones lose their end. Default: the fusion's."""

    precision: Precision = "auto"
    """Type of the specialists' arithmetic. Auto: bfloat16 on a GPU, else float32."""

    seed: Seed = 0
    """Draws conversations, and resamples for intervals."""

    cache: CacheFolder = None

    @model_validator(mode="after")
    def _check(self) -> "AnalysisSettings":
        if self.fusion is None and self.data:
            raise CommandError("data: which fusion reads it? Name a fusion file, folder or preset first")
        if self.fusion is None and not self.run:
            raise CommandError("run: nothing to analyze; name a FUSION with --data, or folders of runs with --run")
        if self.fusion is not None and not self.data:
            raise CommandError("data: a gate is shown on conversations; add --data DOMAIN=FILE")
        return self


parse_settings = partial(
    parse_command,
    AnalysisSettings,
    prog="ultrafuser analyze",
    usage="[FUSION --data DOMAIN=FILE ...] [--run FOLDER ...] --output FOLDER",
    description="Show what a fused model's gate does on conversations, and the curves of training runs.",
    positional="fusion",
)
"""Reads the command line of `ultrafuser analyze`, as `parse_command` does."""


def run(argv: Sequence[str], cache: str | None = None) -> int:
    """The command; returns the exit status. `cache` is the default of `--cache`.

    Raises:
        CommandError, FusionError: one line for the user.
    """
    for path in analyze(parse_settings(argv, cache)):
        print(f"written: {path}", file=sys.stderr, flush=True)
    return 0


def analyze(settings: AnalysisSettings) -> list[Path]:
    """Write what the settings ask for; returns the files.

    Raises:
        CommandError, FusionError: what cannot be done, before any weight is loaded.
    """
    require("matplotlib", "eval")
    output = Path(settings.output).expanduser()
    check_folder(output, "--output")
    contents: dict[str, bytes] = {}
    if settings.run:
        from ultrafuser.gating.analysis.curves import draw_curves
        from ultrafuser.gating.analysis.pictures import png
        from ultrafuser.gating.analysis.runs import read_runs

        contents["curves.png"] = png(draw_curves(read_runs(settings.run)))
    if settings.fusion is not None:
        check_folder(cache_folder(settings.cache), "--cache")
        contents |= _show_gate(settings, settings.fusion)
    for name, content in contents.items():
        write_file(output / name, content)
    return [output / name for name in contents]


def _show_gate(settings: AnalysisSettings, fusion: str) -> dict[str, bytes]:
    """Read the conversations; contents of the files that show the gate, by name."""
    require("datasets", "eval")
    from ultrafuser.gating.analysis.page import render_page
    from ultrafuser.gating.analysis.pictures import draw_entropy, draw_heatmap, png
    from ultrafuser.gating.analysis.tables import as_json, as_markdown
    from ultrafuser.gating.analysis.token_grid import draw_tokens
    from ultrafuser.gating.analysis.weights import summarize
    from ultrafuser.gating.commands.provenance import PROVENANCE_FILE, collect_provenance
    from ultrafuser.gating.model.loading import identify
    from ultrafuser.gating.model.packaged import hidden_bars
    from ultrafuser.gating.progress_bar import StepProgress

    with closing(StepProgress()) as progress, hidden_bars():
        task = _prepare(settings, fusion, progress)
        reading = read_gate(task)
    print("\n".join(task.rows.summary()), file=sys.stderr, flush=True)
    name, specialists = task.loaded.name, task.loaded.specialist_names
    models = [{"name": item.name, **identify(item)} for item in task.prepared.specialists]
    provenance = collect_provenance(settings.model_dump(mode="json"), task.rows.digests, models)
    summaries = summarize(reading, settings.seed)
    shown = _shown(settings, task, reading)
    first = list({conversation.domain: conversation for conversation in reversed(shown)}.values())[::-1]
    return {
        "weights.json": json_bytes(as_json(name, summaries)),
        "weights.md": as_markdown(name, summaries).encode(),
        PROVENANCE_FILE: json_bytes(provenance),
        "heatmap.png": png(draw_heatmap(reading)),
        "entropy.png": png(draw_entropy(reading)),
        "tokens.html": render_page(name, specialists, shown).encode(),
        "tokens.png": png(draw_tokens(specialists, first)),
    }


def _prepare(settings: AnalysisSettings, fusion: str, on_progress: "Report") -> "ReadingTask":
    """Models and rows; what cannot be analysed is refused before they are prepared.

    Raises:
        CommandError: a fusion without a gate.
    """
    from ultrafuser.gating.data.hub import open_data
    from ultrafuser.gating.evaluation.held_out import ReadingOptions, prepare_task
    from ultrafuser.gating.model.fusion import load_fusion

    loaded = load_fusion(fusion)
    if loaded.gate is None or len(loaded.specialists) < 2:
        raise CommandError(f"{fusion}: has no gate to analyze; name a fusion of two or more specialists with a gate")
    options = ReadingOptions(
        cache_folder(settings.cache), settings.limit, settings.seed, settings.max_length, settings.precision
    )
    files = open_data(settings.data, options.cache_dir, settings.limit, on_progress)
    return prepare_task(fusion, files, options, on_progress)


def read_gate(task: "ReadingTask") -> "GateReading":
    """The gate's weights on every response token of the task's conversations."""
    import numpy as np

    from ultrafuser.gating.analysis.transcripts import positions_in_responses
    from ultrafuser.gating.analysis.weights import GateReading
    from ultrafuser.gating.evaluation.held_out import FUSED

    reading = task.read_fusion()
    masks = (row["response_mask"][0] for row in task.rows.dataset)
    return GateReading(
        specialists=tuple(task.loaded.specialist_names),
        weights_SN=reading.weights[FUSED].double().numpy(),
        losses_N=reading.losses[FUSED].double().numpy(),
        offsets=tuple(reading.offsets),
        positions_N=np.array([position for mask in masks for position in positions_in_responses(mask)]),
        domains=task.places,
    )


def _shown(settings: AnalysisSettings, task: "ReadingTask", reading: "GateReading") -> list["ShownConversation"]:
    from transformers import AutoTokenizer

    from ultrafuser.gating.analysis.transcripts import choose, show

    leader = task.prepared.specialists[0]
    tokenizer = AutoTokenizer.from_pretrained(leader.model, revision=leader.revision)
    rows = task.rows.dataset
    return [
        show(reading, domain, number, place, rows[place], tokenizer)
        for domain, number, place in choose(reading, settings.samples, settings.seed)
    ]
