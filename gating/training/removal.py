"""Takes a specialist out of a fusion and its gate, without training: `ultrafuser remove`. See docs/training.md.

Reads the fusion file and the gate; looks at no model. Imports no torch before there is work, so that `--help` answers
at once.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ultrafuser.gating.commands.fields import CommandSettings
from ultrafuser.gating.commands.flags import parse_command
from ultrafuser.gating.commands.places import check_folder
from ultrafuser.gating.errors import TrainError


class RemovalSettings(CommandSettings):
    """Who leaves which fusion."""

    fusion: Annotated[str, Field(min_length=1)]
    """Fusion file, folder or preset to start from; it is not changed."""

    specialist: str
    """The specialist that leaves."""

    output: Annotated[str, Field(min_length=1)]
    """Folder for the fusion of the others."""

    @property
    def output_folder(self) -> Path:
        """Of the others' fusion."""
        return Path(os.path.expanduser(self.output))


parse_settings = partial(
    parse_command,
    RemovalSettings,
    prog="ultrafuser remove",
    usage="FUSION --specialist NAME --output FOLDER",
    description="Take a specialist out of a fused model and its gate, without training.",
    positional="fusion",
)
"""Reads the command line of `ultrafuser remove`, as `parse_command` does."""


def run(argv: Sequence[str], cache: str | None = None) -> int:
    """The command; returns the exit status. Nothing of it is cached.

    Raises:
        CommandError, FusionError, GateError: one line for the user.
    """
    settings = parse_settings(argv)
    path = remove(settings)
    print(f"removed: {path}", file=sys.stderr, flush=True)
    return 0


def remove(settings: RemovalSettings) -> Path:
    """Write the fusion of the others; returns its file. Says who leads and what else of the fusion has changed.

    Raises:
        FusionError, GateError, TrainError: the fusion or its gate cannot be read, the specialist is not in it or alone.
    """
    from ultrafuser.gating.commands.provenance import collect_provenance
    from ultrafuser.gating.model.fusion import load_fusion
    from ultrafuser.gating.model.gate_file import GATE_FILE, read_gate
    from ultrafuser.gating.model.gate_seats import without
    from ultrafuser.gating.model.loading import identify
    from ultrafuser.gating.model.schema import FRESH_GATE
    from ultrafuser.gating.training.results import write_fusion

    loaded = load_fusion(settings.fusion)
    names = loaded.specialist_names
    if settings.specialist not in names:
        raise TrainError(f"--specialist: {settings.specialist!r} is not in the fusion; it has {', '.join(names)}")
    if len(names) == 1:
        raise TrainError(f"--specialist: {names[0]!r} is the only one of {loaded.name}; a fusion has at least one")
    index = names.index(settings.specialist)
    check_folder(settings.output_folder, "--output")
    for name in ("fusion.yaml", GATE_FILE):
        # Perhaps of the fusion itself: one that a draft head was trained for has its gate in another's folder.
        if (settings.output_folder / name).exists():
            raise TrainError(f"--output: {settings.output_folder} has a {name}, which would be replaced; name another")
    gate = None if loaded.gate == FRESH_GATE else without(read_gate(str(loaded.gate), names), index)
    rest = tuple(item for item in loaded.specialists if item.name != settings.specialist)
    plain = loaded.without_draft_head()
    changed = plain.model_copy(update={"specialists": rest, "gate": loaded.gate if len(rest) > 1 else None})
    if index == 0:
        _say(f"{rest[0].name} leads now, in the place of {names[0]}: it samples, and penalties look at its prompt")
    if len(rest) == 1:
        _say(f"{rest[0].name} is left alone, and needs no gate")
    if plain is not loaded:
        _say("the draft head is left out, as it guesses for all specialists that it was trained with")
    models = [{"name": item.name, **identify(item)} for item in rest]
    manifest = collect_provenance(settings.model_dump(mode="json"), {}, models)
    return write_fusion(settings.output_folder, changed, gate if len(rest) > 1 else None, manifest)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
