"""The file of a gate: float32 safetensors whose metadata say what gate it is and for which specialists.

Format v2 names the gate's kind; of v1, which knew the paper's only, the rest is the same.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ultrafuser.gating.errors import GateError
from ultrafuser.gating.files import file_digest
from ultrafuser.gating.json_text import parse_json
from ultrafuser.gating.model.gate import Gate, default_projected_size, fresh_gate
from ultrafuser.gating.model.gate_kind import PAPER, GateKind
from ultrafuser.gating.model.schema import FRESH_GATE

GATE_FORMAT = "ultrafuser-gate-v2"
_FIRST_FORMAT = "ultrafuser-gate-v1"
_LARGEST_SIZE = 2**24
"""Of hidden states and of the gate: what is larger is no size but a damaged file, and torch cannot count with it."""

GATE_FILE = "gate.safetensors"
"""Beside a trained fusion's file."""


@dataclass(frozen=True)
class GateHeader:
    """What a gate file says about itself, read without its weights."""

    specialists: tuple[str, ...]
    hidden_sizes: tuple[int, ...]
    width: int
    kind: GateKind

    projected_size: int | None
    """To which size states are projected, where that is not the default of `Gate`."""

    def empty_gate(self) -> Gate:
        """A gate of this form."""
        return Gate(self.hidden_sizes, self.width, self.kind, self.projected_size)


def save_gate(gate: Gate, path: str | Path, specialists: Sequence[str]) -> None:
    """Write the gate; the metadata name format, kind, specialists, hidden sizes and width."""
    if len(specialists) != len(gate.hidden_sizes):
        raise GateError(f"specialists: {len(specialists)} names for a gate of {len(gate.hidden_sizes)} specialists")
    metadata = {
        "format": GATE_FORMAT,
        "kind": str(gate.kind),
        "specialists": json.dumps(list(specialists)),
        "hidden_sizes": json.dumps(list(gate.hidden_sizes)),
        "width": str(gate.width),
    }
    if gate.projected_size != default_projected_size(gate.hidden_sizes) and not gate.kind.joint:
        metadata["projected_size"] = str(gate.projected_size)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in gate.state_dict().items()}
    save_file(tensors, str(path), metadata=metadata)


def load_gate(path: str | Path, specialists: Sequence[str], hidden_sizes: Sequence[int]) -> Gate:
    """Read a gate for these specialists. `package:fresh` gives an untrained one of the paper's kind (seed 0).

    Raises:
        GateError: as `check_gate`.
    """
    if str(path) == FRESH_GATE:
        return fresh_gate(hidden_sizes)
    return _read(path, check_gate(path, specialists, hidden_sizes))


def read_gate(path: str | Path, specialists: Sequence[str]) -> Gate:
    """Read a file's gate for these specialists, of whichever hidden sizes.

    Raises:
        GateError: as `check_gate`.
    """
    return _read(path, check_gate(path, specialists, None))


def _read(path: str | Path, header: GateHeader) -> Gate:
    gate = header.empty_gate()
    with safe_open(str(path), framework="pt") as file:
        names = file.keys()
        gate.load_state_dict({name: file.get_tensor(name).float() for name in names})
    return gate


def check_gate(path: str | Path, specialists: Sequence[str], hidden_sizes: Sequence[int] | None) -> GateHeader:
    """Check a gate file's header, tensor names and shapes against the specialists; reads no weights. Sizes that nobody
    knows (None) are those that the file names.

    Raises:
        GateError: file missing or unreadable, another format, an unknown kind, other specialists, other sizes, other
            tensors.
    """
    header, shapes = _read_header(path)
    _compare(path, "specialists", header.specialists, tuple(specialists))
    if hidden_sizes is not None:
        _compare(path, "hidden_sizes", header.hidden_sizes, tuple(hidden_sizes))
    _check_shapes(path, header, shapes)
    return header


def gate_kind(path: str | Path) -> GateKind:
    """The kind of a gate by its file's header alone; of `package:fresh` the paper's.

    Raises:
        GateError: file missing or unreadable, another format, an unknown kind.
    """
    return GateKind() if str(path) == FRESH_GATE else _read_header(path)[0].kind


def gate_digest(path: str | Path | None) -> str:
    """Which gate this is: the SHA-256 of its file, or "fresh", or "none" for a single specialist."""
    if path is None:
        return "none"
    return "fresh" if str(path) == FRESH_GATE else file_digest(Path(path))


def _read_header(path: str | Path) -> tuple[GateHeader, dict[str, tuple[int, ...]]]:
    """What the file says about itself, and the shapes of its tensors."""
    if not Path(path).is_file():
        raise GateError(f"{path}: no such gate file; train a gate, or use `gate: {FRESH_GATE}` for an untrained one")
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            return _parse_metadata(path, file.metadata() or {}), shapes
    except SafetensorError as error:
        raise GateError(f"{path}: not a safetensors file ({error}); save the gate again with save_gate") from error


def _parse_metadata(path: str | Path, metadata: Mapping[str, str]) -> GateHeader:
    if metadata.get("format") not in (GATE_FORMAT, _FIRST_FORMAT):
        raise GateError(
            f"{path}: format: is {metadata.get('format')!r}, need {GATE_FORMAT!r}; save the gate with save_gate"
        )
    try:
        specialists = tuple(str(name) for name in parse_json(metadata["specialists"]))
        hidden_sizes = tuple(_size(size) for size in parse_json(metadata["hidden_sizes"]))
        if len(specialists) != len(hidden_sizes):
            raise ValueError(f"{len(specialists)} specialists, {len(hidden_sizes)} hidden sizes")
        kind = PAPER if metadata["format"] == _FIRST_FORMAT else metadata["kind"]
        projected_size = _size(metadata["projected_size"]) if "projected_size" in metadata else None
        return GateHeader(specialists, hidden_sizes, _size(metadata["width"]), GateKind.parse(kind), projected_size)
    except GateError as error:
        raise GateError(f"{path}: kind: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise GateError(f"{path}: metadata: cannot be read ({error!r}); save the gate again with save_gate") from error


def _size(text: str | int) -> int:
    size = int(text)
    if not 1 <= size <= _LARGEST_SIZE:
        raise ValueError(f"{size} is no size")
    return size


def _compare(path: str | Path, key: str, found: Sequence[object], wanted: Sequence[object]) -> None:
    if found != wanted:
        raise GateError(
            f"{path}: {key}: the gate was made for {list(found)}, the fusion has {list(wanted)};"
            " use the gate trained for these specialists, in this order"
        )


def _check_shapes(path: str | Path, header: GateHeader, shapes: Mapping[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in header.empty_gate().state_dict().items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise GateError(
                f"{path}: {name}: shape is {shapes.get(name)}, need {wanted.get(name)};"
                " save the gate again with save_gate"
            )
