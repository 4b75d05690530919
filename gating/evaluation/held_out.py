"""A fused model and some conversations, ready to be read teacher-forced: what evaluation and analysis start from.

Knows fusions, files of conversations and the cache; does not know what is made of the losses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ultrafuser.gating.commands.fields import Precision
from ultrafuser.gating.data.conversations import DataFile
from ultrafuser.gating.data.encoded_rows import Rows, load_rows, select
from ultrafuser.gating.data.encoding import make_encoder, resolve_max_length
from ultrafuser.gating.data.hidden_states import (
    CachedHiddenStates,
    cache_hidden_states,
    hidden_state_sources,
    resolve_dtype,
)
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.evaluation.passes import FixedWeights, Mix, Reading, alone, read
from ultrafuser.gating.files import input_file, split_name
from ultrafuser.gating.model.cache import Report
from ultrafuser.gating.model.fusion import FusedModelInfo, inspect_fusion, load_fusion
from ultrafuser.gating.model.gate_file import GATE_FILE, check_gate, gate_kind, load_gate
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.gating.model.schema import FusionConfig, SpecialistConfig

FUSED = "fused"
UNIFORM = "uniform"
GATE_PREFIX = "gate:"
"""Before the name of a gate that is not the fusion's own."""


@dataclass(frozen=True)
class ReadingOptions:
    """Which conversations are read, and how."""

    cache_dir: Path
    """For prepared models, encoded rows and hidden states."""

    limit: int | None = None
    """Most rows of a domain, drawn at random but the same for the same seed."""

    seed: int = 0

    max_length: int | None = None
    """Most tokens of a conversation; default: the fusion's limit."""

    precision: Precision = "auto"
    """Type of the models' arithmetic."""

    batch_size: int = 4
    """Rows that a model computes at a time; rows of like length go together."""


@dataclass(frozen=True)
class ReadingTask:
    """Models are prepared and rows encoded; no weight is loaded yet."""

    loaded: FusionConfig
    """As its file has it."""

    prepared: FusionConfig
    """With plain model folders."""

    info: FusedModelInfo
    """Of `prepared`."""

    rows: Rows
    """The chosen conversations of all domains."""

    device: torch.device
    options: ReadingOptions

    on_progress: Report
    """Told what is being done."""

    gates: Mapping[str, Path]
    """Files of other gates of the same specialists, by name."""

    @property
    def places(self) -> dict[str, list[int]]:
        """Where each domain's rows are; domains that are named as specialists come first, in their order."""
        names = self.loaded.specialist_names
        order = sorted(self.rows.domains, key=lambda domain: names.index(domain) if domain in names else len(names))
        return {domain: self.rows.indices(domain) for domain in order}

    def hidden_states(
        self, fusion: FusionConfig, hidden_sizes: Sequence[int], chosen: slice = slice(None)
    ) -> tuple[CachedHiddenStates, list[Tensor]]:
        """What a prepared fusion's chosen models make of the rows, and their output layers: `cache_hidden_states`."""
        dtype = resolve_dtype(self.options.precision, self.device)
        return cache_hidden_states(
            self.rows.dataset,
            hidden_state_sources(fusion, hidden_sizes, dtype)[chosen],
            num_shared_ids=self.info.num_shared_ids,
            batch_size=self.options.batch_size,
            device=self.device,
            cache_dir=self.options.cache_dir,
            on_progress=self.on_progress,
        )

    def read_fusion(self) -> Reading:
        """Each specialist alone, all with equal weights, and as the gates mix them, from one pass over the rows."""
        names = self.loaded.specialist_names
        mixes: dict[str, Mix] = {name: alone(index, len(names)) for index, name in enumerate(names)}
        if self.prepared.gate is not None:
            mixes[UNIFORM] = FixedWeights((1 / len(names),) * len(names))
            files = {FUSED: self.prepared.gate} | {f"{GATE_PREFIX}{own}": str(self.gates[own]) for own in self.gates}
            for name, file in files.items():
                mixes[name] = load_gate(file, names, self.info.hidden_sizes).to(self.device)
        return self._read(self.prepared, self.info.hidden_sizes, mixes, self.loaded.name)

    @property
    def gate_kinds(self) -> dict[str, str]:
        """The kind of every gate, by the name under which `read_fusion` has it; the fusion's own comes first."""
        kinds = {FUSED: str(gate_kind(self.prepared.gate))} if self.prepared.gate is not None else {}
        return kinds | {f"{GATE_PREFIX}{name}": str(gate_kind(path)) for name, path in self.gates.items()}

    def read_alone(self, model: SpecialistConfig) -> Reading:
        """A prepared model in the leader's place; its losses are under its name."""
        single = self.prepared.alone(model)
        return self._read(single, inspect_fusion(single).hidden_sizes, {model.name: alone(0, 1)}, model.name)

    def _read(self, fusion: FusionConfig, hidden_sizes: Sequence[int], mixes: Mapping[str, Mix], label: str) -> Reading:
        states, output_weights = self.hidden_states(fusion, hidden_sizes)
        tick = partial(self.on_progress, f"losses of {label}")
        return read(states, output_weights, mixes, device=self.device, tick=tick)


def find_gates(arguments: Sequence[str]) -> dict[str, Path]:
    """Files of gates by name, each given as PATH or NAME=PATH; by itself one is called as its file or its folder.

    Raises:
        CommandError: there is no such file, or a name is there twice.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        name, path = split_name(argument)
        path = path / GATE_FILE if path.is_dir() else path
        path = input_file(path, "name a gate's file, or the output folder of a training", kind="gate").resolve()
        name = name or (path.parent.name if path.name == GATE_FILE else path.stem)
        if found.setdefault(name, path) != path:
            raise CommandError(f"--gates: {path} and {found[name]} are both called {name!r}; name one NAME=PATH")
    return found


def prepare_task(
    fusion: str,
    files: Sequence[DataFile],
    options: ReadingOptions,
    on_progress: Report,
    gates: Mapping[str, Path] = MappingProxyType({}),
) -> ReadingTask:
    """Load and check a fusion and other gates of its specialists, prepare its models, encode the rows.

    Raises:
        FusionError, GateError, DataError, TrainError: one line for the user.
    """
    loaded = load_fusion(fusion)
    prepared = materialize(loaded, options.cache_dir, on_progress)
    info = inspect_fusion(prepared)
    for path in gates.values():
        check_gate(path, loaded.specialist_names, info.hidden_sizes)
    encoder, key = make_encoder(prepared, info, resolve_max_length(options.max_length, info))
    rows = load_rows(files, encoder, key=key, cache_dir=options.cache_dir, on_progress=on_progress)
    chosen = select(rows, rows.domains, options.limit, options.seed)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ReadingTask(loaded, prepared, info, chosen, device or torch.device("cpu"), options, on_progress, gates)
