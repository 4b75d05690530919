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
) -> FusedLoss:
    """Sum over tokens of -log softmax(sum over s of w_s * o_s)[label], with o_s = output layer s of hidden state s.

    Args:
        hidden_states: S tensors [N, D_s] that predict the labels.
        output_layers: S modules that make logits [C, V_s] of hidden states [C, D_s].
        weights_SN: float32 mixing weights.
        labels_N: the tokens; each below `num_shared_ids`.
        num_shared_ids: width V of the fused logits.
        chunk_size: tokens whose logits exist at the same time.

    Returns:
        The loss, whose gradient reaches everything that requires one: hidden states, weights, output layers.
    """
    parameters = [parameter for layer in output_layers for parameter in layer.parameters() if parameter.requires_grad]
    call = _Call(tuple(output_layers), num_shared_ids, chunk_size, torch.is_grad_enabled())
    total, tokens_N = _ChunkedLoss.apply(call, labels_N, weights_SN, *hidden_states, *parameters)
    return FusedLoss(total, tokens_N)


@dataclass(frozen=True)
class _Call:
    output_layers: tuple[nn.Module, ...]
    num_shared_ids: int
    chunk_size: int
    wants_gradients: bool


class _ChunkedLoss(torch.autograd.Function):
    """Inputs: call, labels, weights, S hidden states, the output layers' trainable parameters."""

    @staticmethod
    def forward(ctx: Any, call: _Call, labels_N: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        # A Function's inputs have lost their history but still say whether a gradient is wanted.
        wanted = [call.wants_gradients and needed for needed in ctx.needs_input_grad[2:]]
        gradients = [torch.zeros_like(tensor) if need else None for tensor, need in zip(inputs, wanted, strict=True)]
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
    call: _Call, labels_C: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None], rows: slice
) -> Tensor:
    """The chunk's losses; adds its gradients to `gradients`."""
    num_layers = len(call.output_layers)
    with torch.set_grad_enabled(call.wants_gradients):
        weights_SC = _leaf(inputs[0][:, rows], gradients[0])
        hidden = [
            _leaf(tensor[rows], gradient)
            for tensor, gradient in zip(inputs[1 : 1 + num_layers], gradients[1 : 1 + num_layers], strict=True)
        ]
        mixed = (
            weight_C.unsqueeze(1) * layer(state_CD)[..., : call.num_shared_ids].float()
            for layer, state_CD, weight_C in zip(call.output_layers, hidden, weights_SC, strict=True)
        )
        fused_CV = sum(mixed, start=weights_SC.new_zeros(()))
        losses_C = nn.functional.cross_entropy(fused_CV, labels_C, reduction="none")
        leaves = [weights_SC, *hidden, *inputs[1 + num_layers :]]
        wanted = [index for index, gradient in enumerate(gradients) if gradient is not None]
        if wanted:
            found = torch.autograd.grad(losses_C.sum(), [leaves[index] for index in wanted])
            for index, gradient in zip(wanted, found, strict=True):
                target = gradients[index]
                assert target is not None
                _part(target, index, num_layers, rows).add_(gradient)
    return losses_C.detach()


def _leaf(tensor: Tensor, gradient: Tensor | None) -> Tensor:
    return tensor.detach().requires_grad_(gradient is not None)


def _part(target: Tensor, index: int, num_layers: int, rows: slice) -> Tensor:
    """What of an input's gradient a chunk adds to: its own tokens, or all of an output layer's parameter."""
    if index == 0:
        return target[:, rows]
    return target[rows] if index <= num_layers else target
