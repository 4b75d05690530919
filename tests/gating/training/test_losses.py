"""The memory-lean loss held against the plain one: value, gradients, and that it is lean."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ultrafuser.gating.model.mixture import Mixture
from ultrafuser.gating.training.losses import fused_loss

NUM_SHARED, NUM_TOKENS = 50, 37
# The same float32 sums in another order (chunks): measured below 2e-6 relative, with room.
TOLERANCE: Any = {"rtol": 2e-5, "atol": 2e-6}


class CountingLayer(nn.Linear):
    """An output layer that notes how many rows it is asked for."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.rows: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return super().forward(hidden)


def inputs(seed: int = 0) -> tuple[list[Tensor], list[CountingLayer], Tensor, Tensor]:
    torch.manual_seed(seed)
    hidden = [torch.randn(NUM_TOKENS, size, requires_grad=True) for size in (16, 24, 16)]
    layers = [CountingLayer(16, 50), CountingLayer(24, 60), CountingLayer(16, 55)]
    weights = torch.randn(3, NUM_TOKENS).softmax(dim=0).requires_grad_()
    return hidden, layers, weights, torch.randint(0, NUM_SHARED, (NUM_TOKENS,))


def plain_loss(hidden: Any, layers: Any, weights: Tensor, labels: Tensor) -> Tensor:
    """The formula with all logits at once."""
    logits = torch.stack([layer(state)[:, :NUM_SHARED] for layer, state in zip(layers, hidden, strict=True)])
    fused = (weights.unsqueeze(-1) * logits).sum(dim=0)
    return nn.functional.cross_entropy(fused, labels, reduction="sum")


@pytest.mark.parametrize("chunk_size", [1, 5, 37, 1000])
def test_value_and_all_gradients_equal_those_of_the_plain_loss(chunk_size):
    hidden, layers, weights, labels = inputs()
    leaves = [*hidden, weights, *[layer.weight for layer in layers]]
    plain = plain_loss(hidden, layers, weights, labels) / 7
    wanted = torch.autograd.grad(plain, leaves)
    lean = fused_loss(hidden, layers, weights, labels, NUM_SHARED, chunk_size).total / 7
    found = torch.autograd.grad(lean, leaves)
    torch.testing.assert_close(lean, plain, **TOLERANCE)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
        assert float(theirs.abs().max()) > 0


def test_no_more_rows_of_logits_exist_at_once_than_a_chunk_and_each_is_made_once():
    hidden, layers, weights, labels = inputs()
    fused_loss(hidden, layers, weights, labels, NUM_SHARED, 10).total.backward()
    for layer in layers:
        assert layer.rows == [10, 10, 10, 7], "the backward pass computes no logits again"


def test_nothing_but_gradients_is_kept_for_the_backward_pass():
    hidden, layers, weights, labels = inputs()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused_loss(hidden, layers, weights, labels, NUM_SHARED, NUM_TOKENS)
    outside = [tensor.numel() for tensor in (*hidden, weights, *(layer.weight for layer in layers))]
    assert sorted(kept[-len(outside) :]) == sorted(outside)


def test_frozen_parts_get_no_gradient_and_change_none_of_the_others():
    hidden, layers, weights, labels = inputs()
    whole = fused_loss(hidden, layers, weights, labels, NUM_SHARED, 8).total
    (wanted,) = torch.autograd.grad(whole, [weights])
    frozen = [state.detach() for state in hidden]
    for layer in layers:
        layer.weight.requires_grad_(False)
    fused_loss(frozen, layers, weights, labels, NUM_SHARED, 8).total.backward()
    torch.testing.assert_close(weights.grad, wanted, **TOLERANCE)
    assert all(layer.weight.grad is None for layer in layers)


def test_the_tokens_own_losses_sum_to_the_total_and_carry_no_gradient():
    hidden, layers, weights, labels = inputs()
    loss = fused_loss(hidden, layers, weights, labels, NUM_SHARED, 8)
    assert loss.tokens_N.shape == labels.shape
    assert not loss.tokens_N.requires_grad
    torch.testing.assert_close(loss.tokens_N.sum(), loss.total.detach())
    with torch.no_grad():
        alone = plain_loss([state[3:4] for state in hidden], layers, weights[:, 3:4], labels[3:4])
    torch.testing.assert_close(loss.tokens_N[3], alone, **TOLERANCE)


def test_without_gradients_nothing_is_recorded():
    hidden, layers, weights, labels = inputs()
    with torch.no_grad():
        loss = fused_loss(hidden, layers, weights, labels, NUM_SHARED, 8)
    assert not loss.total.requires_grad
    torch.testing.assert_close(loss.total, plain_loss(hidden, layers, weights, labels).detach(), **TOLERANCE)


def test_bfloat16_specialists_are_mixed_in_float32():
    hidden, layers, weights, labels = inputs()
    halved = [state.detach().bfloat16() for state in hidden]
    narrow = [copy.deepcopy(layer).bfloat16() for layer in layers]
    lean = fused_loss(halved, narrow, weights, labels, NUM_SHARED, 8).total
    logits = [layer(state)[:, :NUM_SHARED].float() for layer, state in zip(narrow, halved, strict=True)]
    fused = sum(weight.unsqueeze(1) * own for weight, own in zip(weights, logits, strict=True))
    assert isinstance(fused, Tensor)
    wanted = nn.functional.cross_entropy(fused, labels, reduction="sum")
    torch.testing.assert_close(lean, wanted, **TOLERANCE)


@pytest.mark.parametrize("of_probabilities", [False, True], ids=["logits", "probabilities"])
@pytest.mark.parametrize("is_scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_every_mixture_has_the_value_and_the_gradients_of_its_formula(of_probabilities, is_scaled, chunk_size):
    hidden, layers, weights, labels = inputs()
    scales = torch.tensor([0.5, 1.0, 1.7]).requires_grad_()
    leaves = [*hidden, weights, *([scales] if is_scaled else []), *[layer.weight for layer in layers]]
    logits = torch.stack([layer(state)[:, :NUM_SHARED] for layer, state in zip(layers, hidden, strict=True)])
    logits = logits * scales[:, None, None] if is_scaled else logits
    if of_probabilities:
        fused = (weights.unsqueeze(-1) * logits.softmax(dim=-1)).sum(dim=0).log()
    else:
        fused = (weights.unsqueeze(-1) * logits).sum(dim=0)
    plain = nn.functional.cross_entropy(fused, labels, reduction="sum") / 7
    wanted = torch.autograd.grad(plain, leaves)
    mixture = Mixture(scales if is_scaled else None, of_probabilities)
    lean = fused_loss(hidden, layers, weights, labels, NUM_SHARED, chunk_size, mixture).total / 7
    found = torch.autograd.grad(lean, leaves)
    torch.testing.assert_close(lean, plain, **TOLERANCE)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
        assert float(theirs.abs().max()) > 0


def test_the_papers_mixture_is_rounded_as_ever():
    """Runs that are resumed go on bit for bit: weights times logits, then sums, each rounded by itself."""
    hidden, layers, weights, labels = inputs()
    with torch.no_grad():
        logits = [layer(state)[:, :NUM_SHARED] for layer, state in zip(layers, hidden, strict=True)]
        fused = sum((own.unsqueeze(1) * rows for own, rows in zip(weights, logits, strict=True)), torch.zeros(()))
        wanted = nn.functional.cross_entropy(fused, labels, reduction="none")
        assert torch.equal(fused_loss(hidden, layers, weights, labels, NUM_SHARED, NUM_TOKENS).tokens_N, wanted)
