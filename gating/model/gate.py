"""The gate: one small network that scores every specialist's hidden state.

It is a plain torch module. It does not know its file (`gating/model/gate_file.py`), how its weights mix logits
(`gating/model/mixture.py`), tokenizers, prompts, engines or training.

Shape suffixes: S specialists, B rows (any leading shape), N response tokens (row after row), D hidden size of one
specialist, W width, P numbers of one specialist's part.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ultrafuser.gating.errors import GateError
from ultrafuser.gating.model.gate_kind import GateKind
from ultrafuser.gating.model.mixture import Mixture

DEFAULT_WIDTH = 512
_FRESH_DECAY = 0.9
_SCAN = 256
"""Positions whose means are computed by one product of matrices."""


class Gate(nn.Module):
    """Scores each specialist's last hidden state; softmax over specialists gives the mixing weights.

    The paper's module (section "The model"): Linear(d, width) -> ReLU -> Linear(width, 1), shared by all specialists.
    With unequal hidden sizes each specialist first gets one bias-free Linear(d_s, max d) of its own.

    A `joint` gate: Linear(sum of d, width) -> ReLU -> Linear(width, S) of all states side by side. A `smoothed` gate
    adds to what is before the ReLU a second, bias-free Linear of the exponential mean of the states that predicted the
    response's earlier tokens: m_1 = 0, m_t = decay * m_(t-1) + (1 - decay) * h_(t-1). A `scaled` one has a learned
    temperature and bias of each specialist.

    The engine computes it in parts, which ranks may hold apart: `part_of` each specialist, then `weights_of` them all.

    Args:
        hidden_sizes: hidden size of each specialist, in the fusion file's order.
        width: hidden width of the shared network; 512 in the paper.
        kind: what is changed of the paper's gate.
    """

    def __init__(self, hidden_sizes: Sequence[int], width: int = DEFAULT_WIDTH, kind: GateKind | None = None) -> None:
        super().__init__()
        self.hidden_sizes = tuple(int(size) for size in hidden_sizes)
        self.width = int(width)
        self.kind = kind or GateKind()
        if not self.hidden_sizes or min(self.hidden_sizes) < 1 or self.width < 1:
            raise GateError(f"hidden_sizes: need positive sizes and width, got {self.hidden_sizes} and {self.width}")
        num_specialists, shared_size = len(self.hidden_sizes), max(self.hidden_sizes)
        is_projected = len(set(self.hidden_sizes)) > 1 and not self.kind.joint
        input_size = sum(self.hidden_sizes) if self.kind.joint else shared_size
        # The order of creation is the order in which a seed is spent: keep it, or every fresh gate changes.
        self.hidden = nn.Linear(input_size, self.width)
        self.score = nn.Linear(self.width, num_specialists if self.kind.joint else 1)
        self.projections = nn.ModuleList(
            nn.Linear(size, shared_size, bias=False) for size in self.hidden_sizes if is_projected
        )
        if self.kind.smoothed:
            self.memory = nn.Linear(input_size, self.width, bias=False)
            self.decay_logit = nn.Parameter(torch.tensor(math.log(_FRESH_DECAY / (1 - _FRESH_DECAY))))
        if self.kind.scaled:
            self.log_temperatures = nn.Parameter(torch.zeros(num_specialists))
            self.biases = nn.Parameter(torch.zeros(num_specialists))

    def forward(self, hidden_states: Sequence[Tensor], responses_N: Tensor | None = None) -> Tensor:
        """Mixing weights of the specialists.

        Args:
            hidden_states: S tensors [..., D_s], after each specialist's final norm, in any float dtype.
            responses_N: of which response each of N positions is, int [N], those of one side by side and in order; a
                smoothed gate then looks back within it. Without it every position is the first of a response.

        Returns:
            float32 weights [S, ...] that sum to one over S. Everything is computed in float32.
        """
        assert len(hidden_states) == len(self.hidden_sizes)
        parts = []
        for index, state in enumerate(hidden_states):
            memory = None
            if self.kind.smoothed and responses_N is not None:
                memory = means_before(self.added_by(index, state), self.decay, responses_N)
            parts.append(self.part_of(index, state, memory))
        return self.weights_of(torch.stack(parts))

    @property
    def part_size(self) -> int:
        """P: what one specialist adds to a row's scores, in numbers."""
        return self.width if self.kind.joint else 1

    def part_of(self, index: int, hidden_BD: Tensor, memory_BW: Tensor | None = None) -> Tensor:
        """One specialist's part [..., P], float32, of which `weights_of` makes weights.

        `memory_BW` is what a smoothed gate has of the response's earlier states, as `remember` makes it; None for none.
        """
        # Autocast would quietly take the linear layers back to bfloat16.
        with torch.autocast(hidden_BD.device.type, enabled=False):
            own = self._read(index, hidden_BD, self.hidden.weight, None if self.kind.joint else self.hidden.bias)
            if memory_BW is not None:
                own = own + memory_BW
            if self.kind.joint:
                return own
            return nn.functional.linear(own.relu(), self.score.weight.float(), self.score.bias.float())

    def weights_of(self, parts_SBP: Tensor) -> Tensor:
        """float32 weights [S, ...] that sum to one over S, of all specialists' parts [S, ..., P]."""
        with torch.autocast(parts_SBP.device.type, enabled=False):
            if self.kind.joint:
                inner = (parts_SBP.sum(dim=0) + self.hidden.bias.float()).relu()
                scores_BS = nn.functional.linear(inner, self.score.weight.float(), self.score.bias.float())
            else:
                scores_BS = parts_SBP.squeeze(-1).movedim(0, -1)
            if self.kind.scaled:
                scores_BS = scores_BS + self.biases.float()
            return scores_BS.movedim(-1, 0).softmax(dim=0)

    def remember(self, index: int, hidden_BD: Tensor, memory_BW: Tensor) -> Tensor:
        """A smoothed gate's memory [..., W], float32, after a state: zero before the first one of a response.

        It is the mean as the second layer reads it, which is the mean of what that layer reads.
        """
        return self.decay * memory_BW + (1 - self.decay) * self.added_by(index, hidden_BD)

    def added_by(self, index: int, hidden_BD: Tensor) -> Tensor:
        """What a smoothed gate's second layer reads [..., W] in a state."""
        with torch.autocast(hidden_BD.device.type, enabled=False):
            return self._read(index, hidden_BD, self.memory.weight, None)

    @property
    def decay(self) -> Tensor:
        """Of a smoothed gate: what is kept of the mean at each token, a number between 0 and 1."""
        return self.decay_logit.float().sigmoid()

    @property
    def mixture(self) -> Mixture:
        """How the weights mix the logits; the temperatures carry their gradient."""
        scales_S = (-self.log_temperatures.float()).exp() if self.kind.scaled else None
        return Mixture(scales_S, self.kind.probabilities)

    def _read(self, index: int, hidden_BD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear layer's values [..., W] at one specialist's state."""
        state, weight = hidden_BD.float(), weight.float()
        if self.projections:
            projection = self.projections[index]
            assert isinstance(projection, nn.Linear)
            state = nn.functional.linear(state, projection.weight.float())
        if self.kind.joint:
            begin = sum(self.hidden_sizes[:index])
            weight = weight[:, begin : begin + self.hidden_sizes[index]]
        return nn.functional.linear(state, weight, None if bias is None else bias.float())


def means_before(added_NW: Tensor, decay: Tensor, responses_N: Tensor) -> Tensor:
    """The exponential mean [N, W] that stands before each position: zero at the first of a response.

    Positions of one response are side by side in `responses_N`. Differentiable in `added_NW` and `decay`.
    """
    _, lengths = torch.unique_consecutive(responses_N, return_counts=True)
    means = []
    for own_TW in added_NW.split(lengths.tolist()):
        carried_W = own_TW.new_zeros(own_TW.shape[1])
        for block_TW in own_TW.split(_SCAN):
            steps_T = torch.arange(len(block_TW) + 1, device=block_TW.device)
            ages_TT = (steps_T[:, None] - 1 - steps_T[None, :-1]).clamp(min=0)
            shares_TT = ((1 - decay) * decay**ages_TT).tril(-1)
            after_TW = shares_TT @ block_TW + decay ** steps_T[:, None] * carried_W
            means.append(after_TW[:-1])
            carried_W = after_TW[-1]
    return torch.cat(means) if means else added_NW


def fresh_gate(
    hidden_sizes: Sequence[int], width: int = DEFAULT_WIDTH, seed: int = 0, kind: GateKind | None = None
) -> Gate:
    """An untrained gate, the same on every machine for the same arguments; leaves torch's own random state alone.

    Its layers are torch's default: uniform in +-1/sqrt(inputs). Temperatures are 1, biases 0, the decay is 0.9.
    """
    # Without memory first: a layer's own initialisation would draw from torch's global generator.
    with torch.device("meta"):
        empty = Gate(hidden_sizes, width, kind)
    gate = empty.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    layers = [gate.hidden, gate.score, *gate.projections, *([gate.memory] if gate.kind.smoothed else [])]
    with torch.no_grad():
        for layer in layers:
            assert isinstance(layer, nn.Linear)
            bound = 1 / math.sqrt(layer.in_features)
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
        if gate.kind.smoothed:
            gate.decay_logit.fill_(math.log(_FRESH_DECAY / (1 - _FRESH_DECAY)))
        if gate.kind.scaled:
            gate.log_temperatures.zero_()
            gate.biases.zero_()
    return gate
