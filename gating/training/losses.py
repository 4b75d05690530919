"""The fused loss without the fused logits: chunks of response tokens, gradients on the way, nothing kept.

The plain loss (`gating/model/reference.py`) holds n logits of every response token of a batch, twice. Here at most
`chunk_size` tokens' logits exist at any moment: each chunk's gradient is taken at once and only gradients of the
inputs are kept, so that nothing has to be computed again in the backward pass. Knows tensors and output layers only.

Shape suffixes: S specialists, N response tokens of a batch, C tokens of a chunk, D hidden size, V shared vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ultrafuser.gating.model.mixture import PAPERS_MIXTURE, Mixture, fuse

DEFAULT_CHUNK_SIZE = 256


@dataclass(frozen=True)
class FusedLoss:
    """Cross-entropy of the fused logits."""

    total: Tensor
    """Scalar: the sum over the tokens, in nats; carries the gradient."""

    tokens_N: Tensor
    """float32: each token's own, detached."""


def fused_loss(
    hidden_states: Sequence[Tensor],
    output_layers: Sequence[nn.Module],
    weights_SN: Tensor,
    labels_N: Tensor,
    num_shared_ids: int,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    mixture: Mixture = PAPERS_MIXTURE,
) -> FusedLoss:
    """Sum over tokens of -log softmax(fused logits)[label], with o_s = output layer s of hidden state s.

    The fused logits are, by the paper's mixture, the sum over s of w_s * o_s.

    Args:
        hidden_states: S tensors [N, D_s] that predict the labels.
        output_layers: S modules that make logits [C, V_s] of hidden states [C, D_s].
        weights_SN: float32 mixing weights.
        labels_N: the tokens; each below `num_shared_ids`.
        num_shared_ids: width V of the fused logits.
        chunk_size: tokens whose logits exist at the same time.
        mixture: how they are mixed.

    Returns:
        The loss, whose gradient reaches everything that requires one: hidden states, weights, the mixture's scales,
        output layers.
    """
    parameters = [parameter for layer in output_layers for parameter in layer.parameters() if parameter.requires_grad]
    call = _Call(tuple(output_layers), num_shared_ids, chunk_size, mixture.of_probabilities, torch.is_grad_enabled())
    inputs = (weights_SN, mixture.scales_S, *hidden_states, *parameters)
    total, tokens_N = _ChunkedLoss.apply(call, labels_N, *inputs)
    return FusedLoss(total, tokens_N)


def mix(weights_SC: Tensor, logits: Sequence[Tensor], num_shared_ids: int, mixture: Mixture) -> Tensor:
    """As `fuse`, but logits are multiplied, then added, each rounded: so runs go on bit for bit that began before it.

    The engine's mixing multiplies and adds in one, in place.
    """
    if mixture.of_probabilities:
        return fuse(weights_SC, logits, num_shared_ids, mixture)
    if mixture.scales_S is not None:
        weights_SC = weights_SC * mixture.scales_S.unsqueeze(1)
    weighed = (
        weight_C.unsqueeze(1) * own_CV[:, :num_shared_ids].float()
        for weight_C, own_CV in zip(weights_SC, logits, strict=True)
    )
    return sum(weighed, start=weights_SC.new_zeros(()))


@dataclass(frozen=True)
class _Call:
    output_layers: tuple[nn.Module, ...]
    num_shared_ids: int
    chunk_size: int
    mixes_probabilities: bool
    wants_gradients: bool


class _ChunkedLoss(torch.autograd.Function):
    """Inputs: call, labels, weights, scales or None, S hidden states, the output layers' trainable parameters."""

    @staticmethod
    def forward(ctx: Any, call: _Call, labels_N: Tensor, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        # A Function's inputs have lost their history but still say whether a gradient is wanted.
        wanted = [call.wants_gradients and needed for needed in ctx.needs_input_grad[2:]]
        gradients = [
            torch.zeros_like(tensor) if need and tensor is not None else None
            for tensor, need in zip(inputs, wanted, strict=True)
        ]
        tokens = []
        for begin in range(0, len(labels_N), call.chunk_size):
            rows = slice(begin, begin + call.chunk_size)
            tokens.append(_chunk(call, labels_N[rows], inputs, gradients, rows))
        ctx.save_for_backward(*gradients)
        tokens_N = torch.cat(tokens) if tokens else labels_N.new_zeros(0, dtype=torch.float32)
        ctx.mark_non_differentiable(tokens_N)
        return tokens_N.sum(), tokens_N

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _grad_tokens: Tensor) -> tuple[Any, ...]:
        gradients = [None if gradient is None else gradient * grad_total for gradient in ctx.saved_tensors]
        return (None, None, *gradients)


def _chunk(
    call: _Call, labels_C: Tensor, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None], rows: slice
) -> Tensor:
    """The chunk's losses; adds its gradients to `gradients`."""
    num_layers = len(call.output_layers)
    with torch.set_grad_enabled(call.wants_gradients):
        leaves = list(inputs)
        for index, tensor in enumerate(inputs[: 2 + num_layers]):  # the output layers' parameters are leaves already
            if tensor is not None:
                own = _part(tensor, index, num_layers, rows).detach()
                leaves[index] = own.requires_grad_(gradients[index] is not None)
        weights_SC, scales_S, *states = leaves[: 2 + num_layers]
        assert weights_SC is not None
        logits = [layer(state_CD) for layer, state_CD in zip(call.output_layers, states, strict=True)]
        fused_CV = mix(weights_SC, logits, call.num_shared_ids, Mixture(scales_S, call.mixes_probabilities))
        losses_C = nn.functional.cross_entropy(fused_CV, labels_C, reduction="none")
        pairs = enumerate(zip(leaves, gradients, strict=True))
        wanted = [(index, leaf, own) for index, (leaf, own) in pairs if leaf is not None and own is not None]
        if wanted:
            found = torch.autograd.grad(losses_C.sum(), [leaf for _, leaf, _ in wanted])
            for (index, _, target), gradient in zip(wanted, found, strict=True):
                _part(target, index, num_layers, rows).add_(gradient)
    return losses_C.detach()


def _part(tensor: Tensor, index: int, num_layers: int, rows: slice) -> Tensor:
    """What of an input, or of its gradient, is a chunk's: its own tokens, or all of the scales and of parameters."""
    if index == 0:
        return tensor[:, rows]
    return tensor[rows] if 1 < index < 2 + num_layers else tensor
