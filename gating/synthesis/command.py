"""Makes instruction data: `ultrafuser data make`, `export`, `map`. Cleans any data: `clean`. See docs/data.md.

Puts the parts of `gating/synthesis/` together.
"""

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ultrafuser.gating.commands.flags import parse_command, require
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.model.cache import cache_folder
from ultrafuser.gating.progress_bar import StepProgress
from ultrafuser.gating.synthesis.settings import CleanSettings, ExportSettings, MakeSettings, MapSettings

if TYPE_CHECKING:
    from ultrafuser.gating.synthesis.make import Ending
    from ultrafuser.gating.synthesis.stages.structure import Structure

_USAGE = """\
usage: ultrafuser data COMMAND FOLDER [options]

Make instruction data for the domains of a fusion by calls to a model behind an OpenAI API, or clean what there is.

  make     make topics, instructions and responses into a folder; the same command goes on where it was stopped
  export   write what was made as a data set: the training format, with statistics and a data card
  map      draw the data set as a specialist sees it
  clean    copy files of conversations without duplicates and without what evaluation asks

`ultrafuser data COMMAND --help` lists the options.
"""


def parse_settings(argv: Sequence[str], cache: str | None = None) -> BaseModel:
    """Read the command line of `ultrafuser data`; prints and exits for `--help`. `cache` is as in `run`.

    Raises:
        CommandError: an unknown command or flag, or a value that does not fit.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        raise SystemExit(0)
    if argv[0] not in _COMMANDS:
        raise CommandError(f"{argv[0]}: no such command; one of {', '.join(_COMMANDS)}, see `ultrafuser data --help`")
    model, _, description = _COMMANDS[argv[0]]
    return parse_command(
        model,
        argv[1:],
        cache,
        prog=f"ultrafuser data {argv[0]}",
        usage="FOLDER [options]",
        description=description,
        positional="output",
    )


def run(argv: Sequence[str], cache: str | None = None) -> int:
    """The command; returns the exit status: 0, or 1 if something is still missing. `cache` is the default of `--cache`.

    Raises:
        CommandError, FusionError: one line for the user.
    """
    settings = parse_settings(argv, cache)
    return _COMMANDS[argv[0]][1](settings)


def _make(settings: MakeSettings) -> int:
    structure = settings.structure()
    if settings.dry_run:
        return _estimate(settings, structure)
    for package in ("datasketch", "py3langid"):
        require(package, "data")
    from ultrafuser.gating.synthesis.make import make

    ending = asyncio.run(make(settings, structure))
    print(_describe(ending), file=sys.stderr, flush=True)
    return int(ending.is_stopped or bool(ending.num_failed))


def _estimate(settings: MakeSettings, structure: "Structure") -> int:
    from ultrafuser.gating.commands.run_folder import SETTINGS_FILE, keep_settings, sole_run
    from ultrafuser.gating.synthesis.calls.estimate import describe, estimate
    from ultrafuser.gating.synthesis.stages.store import Store

    folder = Path(settings.output).expanduser()
    if not (folder / SETTINGS_FILE).exists():
        print("\n".join(describe(estimate(structure, None), settings.prices)))
        return 0
    with sole_run(folder), Store(folder) as store:
        keep_settings(folder, structure.as_json())
        print("\n".join(describe(estimate(structure, store), settings.prices)))
    return 0


def _export(settings: ExportSettings) -> int:
    from ultrafuser.gating.synthesis.dataset.export import export

    print(f"written: {export(settings)}", file=sys.stderr, flush=True)
    return 0


def _map(settings: MapSettings) -> int:
    from ultrafuser.gating.synthesis.dataset.map import draw_map

    print(f"written: {draw_map(settings)}", file=sys.stderr, flush=True)
    return 0


def _clean(settings: CleanSettings) -> int:
    require("datasketch", "data")
    from ultrafuser.gating.data.cleaning import check_new, clean
    from ultrafuser.gating.data.decontamination import parse_test_sets
    from ultrafuser.gating.data.hub import open_data

    output = Path(settings.output).expanduser()
    check_new(output)
    parse_test_sets(settings.against)  # before rows are fetched, which can take hours
    with closing(StepProgress()) as progress:
        removed = clean(
            open_data(settings.data, cache_folder(settings.cache), on_progress=progress),
            settings.against,
            threshold=settings.duplicate_threshold,
            output=output,
            settings=settings.model_dump(mode="json"),
            on_progress=progress,
        )
    lines = [f"{name}: {own}" for name, own in removed.items()]
    print("\n".join([*lines, f"written: {output}"]), file=sys.stderr, flush=True)
    return 0


def _describe(ending: "Ending") -> str:
    lines = []
    for stage, counts in ending.report["stages"].items():
        reasons = {**counts["rejected"], **counts["missed"]}
        why = ", ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items()))
        lines.append(f"{stage}: {counts['items']:,} made" + (f"; without {why}" if why else ""))
    lines.append(f"cost: {ending.report['cost']:g}")
    if ending.is_stopped:
        lines.append("stopped: the budget is spent; the same command with a larger --budget goes on")
    if ending.num_failed:
        lines.append(f"{ending.num_failed:,} calls failed; the same command tries them again")
    return "\n".join(lines)


_COMMANDS: Mapping[str, tuple[type[BaseModel], Callable[[Any], int], str]] = {
    "make": (MakeSettings, _make, "Make instruction data by calls to a model."),
    "export": (ExportSettings, _export, "Write what was made as a data set."),
    "map": (MapSettings, _map, "Draw a data set as a specialist sees it."),
    "clean": (CleanSettings, _clean, "Copy conversations without duplicates and without what evaluation asks."),
}
