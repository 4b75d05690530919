"""A specialist that joins a trained fusion: who it is, the gate with a seat for it, and what of that gate learns.

Knows fusion files and gates. Does not know data, learners and trainers.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ultrafuser.gating.errors import FusionError, TrainError
from ultrafuser.gating.model.fusion import load_fusion, preset_names, resolve_source
from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.gate_file import check_gate, load_gate
from ultrafuser.gating.model.gate_seats import Part, num_own, own_parts, widened
from ultrafuser.gating.model.schema import FRESH_GATE, FusionConfig, SpecialistConfig
from ultrafuser.gating.training.settings import TrainSettings


def starting_fusion(settings: TrainSettings) -> FusionConfig:
    """The fusion that a run starts from; a newcomer is its last specialist, and its gate then knows the others only.

    Raises:
        FusionError, TrainError: a fusion cannot be read, the newcomer's name is taken, nobody is found under its name,
            or there is no trained gate that it could join.
    """
    loaded = load_fusion(settings.fusion)
    if settings.add is None:
        return loaded
    name, source = settings.newcomer
    if name in loaded.specialist_names:
        names = ", ".join(loaded.specialist_names)
        raise TrainError(f"--add: the name {name!r} is taken, {loaded.name} has {names}; give the newcomer another")
    if loaded.gate is None or loaded.gate == FRESH_GATE or not Path(loaded.gate).is_file():
        raise TrainError(
            f"--add: {loaded.name} has no trained gate (gate: {loaded.gate}); put {name} into its fusion file and train"
            " a gate for all of them with --stage 1"
        )
    return loaded.model_copy(update={"specialists": (*loaded.specialists, _newcomer(name, source))})


def _newcomer(name: str, source: str) -> SpecialistConfig:
    path = Path(os.path.expanduser(source))
    if path.is_file() or (path / "fusion.yaml").is_file() or (source in preset_names() and not path.is_dir()):
        return _out_of(load_fusion(source), name).model_copy(update={"name": name})
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise TrainError(f"--add: {source} is an adapter; name a fusion file that has it beside its model")
    try:
        return SpecialistConfig(name=name, model=resolve_source(source, Path.cwd(), "--add"))
    except FusionError as error:
        raise TrainError(str(error)) from error


def _out_of(fusion: FusionConfig, name: str) -> SpecialistConfig:
    """The specialist of this name, or the only one."""
    found = [item for item in fusion.specialists if item.name == name] or list(fusion.specialists)
    if len(found) > 1:
        names = ", ".join(fusion.specialist_names)
        raise TrainError(f"--add: {fusion.name} has no specialist {name!r}; take one of {names} under its own name")
    return found[0]


@contextmanager
def naming_the_newcomer(settings: TrainSettings, fusion: FusionConfig) -> Iterator[None]:
    """What is wrong with a fusion's last specialist is told of the newcomer: no file has the key that it would have."""
    key = f"specialists.{len(fusion.specialists) - 1}."
    try:
        yield
    except FusionError as error:
        if settings.add is None or not str(error).startswith(key):
            raise
        raise TrainError(f"--add: {settings.newcomer[0]}: {str(error).removeprefix(key)}") from error


def gate_before(fusion: FusionConfig, hidden_sizes: Sequence[int]) -> Gate:
    """The gate of all but the newcomer, as it was trained; `hidden_sizes` are of all.

    Raises:
        GateError: as `check_gate`.
    """
    return load_gate(str(fusion.gate), fusion.specialist_names[:-1], hidden_sizes[:-1])


def gate_for_newcomer(fusion: FusionConfig, hidden_sizes: Sequence[int]) -> Gate:
    """That gate with a seat for the newcomer, whose own numbers learn, or all of them where it has none of its own.

    What does not learn has no gradient: of a parameter that the newcomer has a part of, the rest's is zero.
    """
    gate = widened(gate_before(fusion, hidden_sizes), hidden_sizes[-1])
    own = own_parts(gate, len(hidden_sizes) - 1)
    for name, parameter in gate.named_parameters():
        parameter.requires_grad_(name in own or not own)
        if name in own:
            parameter.register_hook(partial(_only, own[name]))
    return gate


def empty_gate_for_newcomer(fusion: FusionConfig, hidden_sizes: Sequence[int]) -> Gate:
    """The same without memory, on the meta device, by the header of the gate's file: to count, not to compute.

    Raises:
        GateError: as `check_gate`.
    """
    header = check_gate(str(fusion.gate), fusion.specialist_names[:-1], hidden_sizes[:-1])
    with torch.device("meta"):
        return widened(header.empty_gate(), hidden_sizes[-1])


def what_learns(gate: Gate, name: str) -> str:
    """For people: how much of a gate with a seat for the newcomer of this name learns."""
    count = num_own(gate, len(gate.hidden_sizes) - 1)
    return f"{count:,} learn, those of {name} alone" if count else f"all learn, as none is {name}'s alone"


def _only(part: Part, gradient: Tensor) -> Tensor:
    kept = torch.zeros_like(gradient)
    kept.narrow(*part).copy_(gradient.narrow(*part))
    return kept
