"""Evaluates a fused model: `ultrafuser eval`. Held-out loss per domain, or benchmarks through a running server.

Puts the parts of `gating/evaluation/` together. See docs/evaluation.md.
"""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from ultrafuser.gating.commands.places import check_folder, output_file, output_folder
from ultrafuser.gating.evaluation.settings import EvalSettings, parse_settings
from ultrafuser.gating.model.cache import cache_folder
from ultrafuser.gating.progress_bar import StepProgress

if TYPE_CHECKING:
    from ultrafuser.gating.evaluation.loss import LossTable
    from ultrafuser.gating.model.cache import Report


def run(argv: Sequence[str], cache: str | None = None) -> int:
    """The command; returns the exit status. `cache` is the default of `--cache`.

    Raises:
        CommandError, FusionError: one line for the user.
    """
    from ultrafuser.gating.model.packaged import hidden_bars

    settings = parse_settings(argv, cache)
    _check_outputs(settings)
    if settings.benchmark:
        from ultrafuser.gating.evaluation.benchmarks.benchmarks import run_benchmarks

        asyncio.run(run_benchmarks(settings))
    with closing(StepProgress()) as progress, hidden_bars():
        if settings.variants is not None:
            _write_variants(settings, progress)
        if settings.loss:
            _report(settings, *_measure(settings, progress))
    return 0


def _check_outputs(settings: EvalSettings) -> None:
    """All of them: benchmarks come first, and take hours."""
    if settings.benchmark:
        check_folder(settings.output_folder, "--output")
    if settings.variants is not None:
        check_folder(settings.variants, "--variants")
    if settings.json_file is not None:
        output_file(settings.json_file, "--json")
    if settings.fusion is not None:
        check_folder(cache_folder(settings.cache), "--cache")


def _measure(settings: EvalSettings, on_progress: "Report") -> "tuple[LossTable, LossTable | None]":
    """The losses by domain, and of joined turns where they are asked for."""
    from ultrafuser.gating.data.hub import open_data
    from ultrafuser.gating.evaluation.held_out import ReadingOptions, find_gates, prepare_task
    from ultrafuser.gating.evaluation.loss import check_rows, measure
    from ultrafuser.gating.evaluation.mixed_turns import join_turns, measure_turns
    from ultrafuser.gating.model.fusion import load_fusion

    chosen = settings.model_dump(include=set(ReadingOptions.__dataclass_fields__))
    options = ReadingOptions(cache_dir=cache_folder(settings.cache), **chosen)
    gates = find_gates(settings.gates)
    names = [name for name in (settings.fusion, settings.baseline) if name is not None]
    specialists = [load_fusion(name).specialist_names for name in names]
    for own in specialists:
        check_rows(own)
    # Joined turns are drawn from all rows.
    limit = settings.limit if settings.mixed_turns is None else None
    files = open_data(settings.data, options.cache_dir, limit, on_progress)
    joined = None
    if settings.mixed_turns is not None:
        joined = join_turns(files, specialists[0], settings.mixed_turns, options, on_progress)
    tables = []
    for name, own_gates in zip(names, (gates, {}), strict=False):
        task = prepare_task(name, files, options, on_progress, own_gates)
        print("\n".join(task.rows.summary()), file=sys.stderr)
        tables.append(measure(task, base=settings.base, scale=settings.task_arithmetic_scale))
    turns = None
    if joined is not None:
        task = prepare_task(names[0], [joined], replace(options, limit=None), on_progress, gates)
        turns = measure_turns(task)
    return tables[0] if len(tables) == 1 else tables[0].with_baseline(tables[1]), turns


def _report(settings: EvalSettings, table: "LossTable", turns: "LossTable | None") -> None:
    from ultrafuser.gating.evaluation.loss import describe
    from ultrafuser.gating.evaluation.mixed_turns import describe_turns, turns_as_json
    from ultrafuser.gating.files import write_json

    lines, content = describe(table), table.as_json()
    if turns is not None:
        lines += describe_turns(turns)
        content["mixed_turns"] = turns_as_json(turns)
    print("\n".join(lines))
    if settings.json_file is not None:
        write_json(output_file(settings.json_file, "--json"), content)


def _write_variants(settings: EvalSettings, on_progress: "Report") -> None:
    """One fusion file of a single model for each of the table's rows that is one."""
    from ultrafuser.gating.evaluation.loss import check_rows
    from ultrafuser.gating.evaluation.merging import find_variants
    from ultrafuser.gating.model.fusion import inspect_fusion, load_fusion, save_fusion
    from ultrafuser.gating.model.materialize import materialize

    assert settings.fusion is not None
    assert settings.variants is not None
    cache_dir = cache_folder(settings.cache)
    loaded = load_fusion(settings.fusion)
    check_rows(loaded.specialist_names)
    folder = output_folder(settings.variants, "--variants")
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
    for model in (*prepared.specialists, *merged):
        variant = loaded.alone(model).model_copy(update={"name": f"{loaded.name}-{model.name}"})
        save_fusion(variant, folder / f"{model.name}.yaml")
        print(folder / f"{model.name}.yaml")
    for note in notes:
        print(note, file=sys.stderr)
