"""The checkpoints of a run, as they lie on disk: which are there, and which of them is whole.

A checkpoint that has its name was whole when it got it; a full disk or a loss of power may have taken some of it since.
Knows files; does not know what is trained.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ultrafuser.gating.commands.provenance import PROVENANCE_FILE
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.files import find_damage, put_in_place, read_json

CHECKPOINT_PREFIX = "checkpoint-"
TRAINED_FILE = "trained.safetensors"
"""What learns, of a checkpoint."""

CONTENTS_FILE = "contents.json"
"""How long the other files of a checkpoint are."""

_STATE_FILE = "trainer_state.json"
_JSON_FILES = (PROVENANCE_FILE, _STATE_FILE)


def all_checkpoints(folder: Path) -> list[Path]:
    """Of a run's folder, the newest first."""
    found = [path for path in folder.glob(f"{CHECKPOINT_PREFIX}*") if _step(path).isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(_step(path)), reverse=True)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, as is the best one before it; and what is wrong with newer ones."""
    damages: list[str] = []
    for checkpoint in all_checkpoints(folder):
        damage = next(_damages(checkpoint), None) or _damage_of_best(checkpoint)
        if damage is None:
            return checkpoint, damages
        damages.append(f"{checkpoint.name}: {damage}")
    return None, damages


def newer_than(checkpoint: Path) -> list[Path]:
    """The checkpoints of its run that were written after it."""
    found = all_checkpoints(checkpoint.parent)
    return found[: found.index(checkpoint)]


def put_aside(damaged: list[Path]) -> None:
    """Give damaged checkpoints other names, so that none of them is kept in the place of a whole one."""
    for checkpoint in damaged:
        put_in_place(checkpoint, checkpoint.with_name(f"damaged-{checkpoint.name}"))


def _step(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix(CHECKPOINT_PREFIX)


def _damage_of_best(checkpoint: Path) -> str | None:
    """Of the checkpoint that was the best when this one was saved; a run that goes on from here may end with it."""
    step = read_json(checkpoint / _STATE_FILE, "").get("best_global_step")
    best = checkpoint.with_name(f"{CHECKPOINT_PREFIX}{step}")
    if step is None or best == checkpoint:
        return None
    damage = next(_damages(best), None) if best.is_dir() else "is missing"
    return damage and f"the best one before it, {best.name}: {damage}"


def _damages(checkpoint: Path) -> Iterator[str]:
    """By what was noted, and by each file's own form, which says where it ends."""
    if damage := find_damage(checkpoint, checkpoint / CONTENTS_FILE):
        yield damage
    for name in _JSON_FILES:
        try:
            read_json(checkpoint / name, "")
        except CommandError as error:
            yield f"{name} is damaged ({str(error).removeprefix(f'{checkpoint / name}: ').rstrip('; ')})"
    try:
        with safe_open(str(checkpoint / TRAINED_FILE), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        yield f"{TRAINED_FILE} is damaged ({error})"
    for path in sorted(checkpoint.glob("*.pt*")):
        if not zipfile.is_zipfile(path):
            yield f"{path.name} is damaged (its end is missing)"
