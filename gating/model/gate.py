"""The gate: one small network that scores every specialist's hidden state, and the mixing of their logits.

It is a plain torch module with a file format. It does not know tokenizers, prompts, engines or training.

Shape suffixes: S specialists, B rows (any leading shape), D hidden size of one specialist, V vocabulary rows.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ultrafuser.gating.errors import GateError
from ultrafuser.gating.files import file_digest
from ultrafuser.gating.json_text import parse_json
from ultrafuser.gating.model.schema import FRESH_GATE

GATE_FORMAT = "ultrafuser-gate-v1"
DEFAULT_WIDTH = 512


class Gate(nn.Module):
    """Scores each specialist's last hidden state; softmax over specialists gives the mixing weights.

    The paper's module (section "The model"): Linear(d, width) -> ReLU -> Linear(width, 1), shared by all specialists.
    With unequal hidden sizes each specialist first gets one bias-free Linear(d_s, max d) of its own.

    Args:
        hidden_sizes: hidden size of each specialist, in the fusion file's order.
        width: hidden width of the shared network; 512 in the paper.
    """

    def __init__(self, hidden_sizes: Sequence[int], width: int = DEFAULT_WIDTH) -> None:
        super().__init__()
        self.hidden_sizes = tuple(int(size) for size in hidden_sizes)
        self.width = int(width)
        if not self.hidden_sizes or min(self.hidden_sizes) < 1 or self.width < 1:
            raise GateError(f"hidden_sizes: need positive sizes and width, got {self.hidden_sizes} and {self.width}")
        shared_size = max(self.hidden_sizes)
        # The order of creation is the order in which a seed is spent: keep it, or every fresh gate changes.
        self.hidden = nn.Linear(shared_size, self.width)
        self.score = nn.Linear(self.width, 1)
        self.projections = nn.ModuleList(
            nn.Linear(size, shared_size, bias=False) for size in self.hidden_sizes if len(set(self.hidden_sizes)) > 1
        )

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Mixing weights of the specialists.

        Args:
            hidden_states: S tensors [..., D_s], after each specialist's final norm, in any float dtype.

        Returns:
            float32 weights [S, ...] that sum to one over S. Everything is computed in float32.
        """
        assert len(hidden_states) == len(self.hidden_sizes)
        scores = [self.score_of(index, state) for index, state in enumerate(hidden_states)]
        return torch.stack(scores).softmax(dim=0)

    def score_of(self, index: int, hidden_BD: Tensor) -> Tensor:
        """One specialist's part [...], float32; a softmax over all specialists' gives the weights."""
        # Autocast would quietly take the linear layers back to bfloat16.
        with torch.autocast(hidden_BD.device.type, enabled=False):
            state = hidden_BD.float()
            if self.projections:
                projection = self.projections[index]
                assert isinstance(projection, nn.Linear)
                state = nn.functional.linear(state, projection.weight.float())
            state = nn.functional.linear(state, self.hidden.weight.float(), self.hidden.bias.float())
            state = nn.functional.linear(state.relu(), self.score.weight.float(), self.score.bias.float())
        return state.squeeze(-1)


def fuse(weights_SB: Tensor, logits: Sequence[Tensor], num_shared_ids: int) -> Tensor:
    """Mix the specialists' logits on the shared vocabulary: sum over s of w_s * o_s (logits, as in the paper).

    Args:
        weights_SB: float32 mixing weights [S, B].
        logits: S tensors [B, V_s] in any float dtype; V_s >= num_shared_ids.
        num_shared_ids: ids 0..num_shared_ids-1 mean the same token for every specialist.

    Returns:
        float32 logits [B, num_shared_ids].
    """
    assert weights_SB.shape[0] == len(logits)
    fused_BV = logits[0][:, :num_shared_ids].float() * weights_SB[0].unsqueeze(1)
    for weights_B, logits_BV in zip(weights_SB[1:], logits[1:], strict=True):
        fused_BV.addcmul_(weights_B.unsqueeze(1), logits_BV[:, :num_shared_ids].float())
    return fused_BV


def fresh_gate(hidden_sizes: Sequence[int], width: int = DEFAULT_WIDTH, seed: int = 0) -> Gate:
    """An untrained gate, the same on every machine for the same arguments; leaves torch's own random state alone.

    Its weights are torch's default for linear layers: uniform in +-1/sqrt(inputs).
    """
    # Without memory first: a layer's own initialisation would draw from torch's global generator.
    with torch.device("meta"):
        gate = Gate(hidden_sizes, width)
    gate = gate.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (gate.hidden, gate.score, *gate.projections):
            assert isinstance(layer, nn.Linear)
            bound = 1 / math.sqrt(layer.in_features)
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
    return gate


@dataclass(frozen=True)
class GateHeader:
    """What a gate file says about itself, read without its weights."""

    specialists: tuple[str, ...]
    hidden_sizes: tuple[int, ...]
    width: int


def save_gate(gate: Gate, path: str | Path, specialists: Sequence[str]) -> None:
    """Write the gate as float32 safetensors; the metadata name format, specialists, hidden sizes and width."""
    if len(specialists) != len(gate.hidden_sizes):
        raise GateError(f"specialists: {len(specialists)} names for a gate of {len(gate.hidden_sizes)} specialists")
    metadata = {
        "format": GATE_FORMAT,
        "specialists": json.dumps(list(specialists)),
        "hidden_sizes": json.dumps(list(gate.hidden_sizes)),
        "width": str(gate.width),
    }
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in gate.state_dict().items()}
    save_file(tensors, str(path), metadata=metadata)


def load_gate(path: str | Path, specialists: Sequence[str], hidden_sizes: Sequence[int]) -> Gate:
    """Read a gate for these specialists. `package:fresh` gives an untrained gate (seed 0) without a file.

    Raises:
        GateError: as `check_gate`.
    """
    if str(path) == FRESH_GATE:
        return fresh_gate(hidden_sizes)
    header = check_gate(path, specialists, hidden_sizes)
    gate = Gate(header.hidden_sizes, header.width)
    with safe_open(str(path), framework="pt") as file:
        names = file.keys()
        gate.load_state_dict({name: file.get_tensor(name).float() for name in names})
    return gate


def check_gate(path: str | Path, specialists: Sequence[str], hidden_sizes: Sequence[int]) -> GateHeader:
    """Check a gate file's header, tensor names and shapes against the specialists; reads no weights.

    Raises:
        GateError: file missing or unreadable, another format, other specialists, other sizes, other tensors.
    """
    if not Path(path).is_file():
        raise GateError(f"{path}: no such gate file; train a gate, or use `gate: {FRESH_GATE}` for an untrained one")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = _parse_metadata(path, file.metadata() or {})
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise GateError(f"{path}: not a safetensors file ({error}); save the gate again with save_gate") from error
    _compare(path, "specialists", header.specialists, tuple(specialists))
    _compare(path, "hidden_sizes", header.hidden_sizes, tuple(hidden_sizes))
    _check_shapes(path, header, shapes)
    return header


def gate_digest(path: str | Path | None) -> str:
    """Which gate this is: the SHA-256 of its file, or "fresh", or "none" for a single specialist."""
    if path is None:
        return "none"
    return "fresh" if str(path) == FRESH_GATE else file_digest(Path(path))


def _parse_metadata(path: str | Path, metadata: Mapping[str, str]) -> GateHeader:
    if metadata.get("format") != GATE_FORMAT:
        raise GateError(
            f"{path}: format: is {metadata.get('format')!r}, need {GATE_FORMAT!r}; save the gate with save_gate"
        )
    try:
        specialists = tuple(str(name) for name in parse_json(metadata["specialists"]))
        hidden_sizes = tuple(int(size) for size in parse_json(metadata["hidden_sizes"]))
        return GateHeader(specialists, hidden_sizes, int(metadata["width"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise GateError(f"{path}: metadata: cannot be read ({error!r}); save the gate again with save_gate") from error


def _compare(path: str | Path, key: str, found: Sequence[object], wanted: Sequence[object]) -> None:
    if found != wanted:
        raise GateError(
            f"{path}: {key}: the gate was made for {list(found)}, the fusion has {list(wanted)};"
            " use the gate trained for these specialists, in this order"
        )


def _check_shapes(path: str | Path, header: GateHeader, shapes: Mapping[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        wanted = {
            name: tuple(tensor.shape) for name, tensor in Gate(header.hidden_sizes, header.width).state_dict().items()
        }
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise GateError(
                f"{path}: {name}: shape is {shapes.get(name)}, need {wanted.get(name)};"
                " save the gate again with save_gate"
            )
