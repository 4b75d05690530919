"""Mixing: hand-written numbers of each mixture, held against float64, and its gradients."""

import pytest
import torch
from torch import Tensor

from ultrafuser.gating.model.mixture import Mixture, fuse

NUM_SHARED = 30
MIXTURES = [(False, False), (False, True), (True, False), (True, True)]


def inputs() -> tuple[Tensor, list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 5, generator=generator).softmax(dim=0)
    logits = [torch.randn(5, size, generator=generator) * 8 for size in (30, 40, 35)]
    return weights, logits, torch.tensor([0.5, 1.0, 1.7])


def plain(weights: Tensor, logits: list[Tensor], scales: Tensor | None, of_probabilities: bool) -> Tensor:
    own = torch.stack([logits_BV[:, :NUM_SHARED].double() for logits_BV in logits])
    own = own if scales is None else own * scales.double()[:, None, None]
    if of_probabilities:
        return (weights.double()[..., None] * own.softmax(dim=-1)).sum(dim=0).log()
    return (weights.double()[..., None] * own).sum(dim=0)


@pytest.mark.parametrize(("of_probabilities", "is_scaled"), MIXTURES)
def test_each_mixture_is_its_formula_in_float64(of_probabilities, is_scaled):
    weights, logits, scales_S = inputs()
    scales = scales_S if is_scaled else None
    found = fuse(weights, logits, NUM_SHARED, Mixture(scales, of_probabilities))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain(weights, logits, scales, of_probabilities), rtol=1e-5, atol=2e-5)
    if of_probabilities:
        torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(5))


def test_mixed_probabilities_are_over_the_shared_ids_alone():
    weights, logits, _ = inputs()
    other = [torch.cat([own[:, :NUM_SHARED], own[:, NUM_SHARED:] + 100], dim=1) for own in logits]
    ours, theirs = (fuse(weights, own, NUM_SHARED, Mixture(None, True)) for own in (logits, other))
    assert torch.equal(ours, theirs)


def test_a_closed_gate_gives_the_one_specialists_log_probabilities_and_nothing_infinite():
    _, logits, _ = inputs()
    weights = torch.tensor([[0.0], [1.0], [0.0]]).expand(-1, 5)
    found = fuse(weights, logits, NUM_SHARED, Mixture(None, True))
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found, logits[1][:, :NUM_SHARED].log_softmax(dim=-1))


def test_what_all_think_impossible_keeps_its_rank():
    """Logits so far apart that the probabilities are zero in float32."""
    logits = [torch.tensor([[500.0, 0.0, 10.0]]), torch.tensor([[400.0, 0.0, -10.0]])]
    found = fuse(torch.tensor([[0.5], [0.5]]), logits, 3, Mixture(None, True))
    assert bool(torch.isfinite(found).all())
    assert found[0].argsort(descending=True).tolist() == [0, 1, 2]
    logits = [own[:, [0, 2, 1]] for own in logits]
    assert fuse(torch.tensor([[0.5], [0.5]]), logits, 3, Mixture(None, True))[0].argsort(descending=True).tolist() == [
        0,
        2,
        1,
    ]


@pytest.mark.parametrize(("of_probabilities", "is_scaled"), MIXTURES)
def test_gradients_reach_weights_logits_and_scales_as_by_the_formula(of_probabilities, is_scaled):
    weights, logits, scales = inputs()
    leaves = [weights, *logits, *([scales] if is_scaled else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    factors = torch.randn(5, NUM_SHARED, generator=torch.Generator().manual_seed(1))
    mixture = Mixture(scales if is_scaled else None, of_probabilities)
    found = torch.autograd.grad((fuse(weights, logits, NUM_SHARED, mixture) * factors).sum(), leaves)
    wanted = torch.autograd.grad((plain(weights, logits, *mixture) * factors).sum(), leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert float(theirs.abs().max()) > 0
