"""How weights mix logits: each mixture against its formula in float64, and where float32 ends."""

import pytest
import torch
from torch import Tensor

from ultrafuser.gating.model.mixture import Mixture, fuse

NUM_SHARED = 50
SCALES = torch.tensor([1.7, 0.5, 1.0])


def example(spread: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """Weights [S, B] and S logits [B, V], of which some rows lie far apart."""
    generator = torch.Generator().manual_seed(0)
    weights_SB = torch.randn(3, 4, generator=generator).softmax(dim=0)
    spreads_B1 = torch.tensor([[1.0], [spread], [1.0], [spread]])
    return weights_SB, [(spreads_B1 * torch.randn(4, size, generator=generator)).to(dtype) for size in (50, 60, 55)]


def formula(weights_SB: Tensor, logits: list[Tensor], mixture: Mixture) -> Tensor:
    """As it is written, in float64."""
    logits_SBV = torch.stack([own[:, :NUM_SHARED].double() for own in logits])
    if mixture.scales_S is not None:
        logits_SBV = logits_SBV * mixture.scales_S.double()[:, None, None]
    if mixture.of_probabilities:
        return (weights_SB.double().log()[..., None] + logits_SBV.log_softmax(dim=-1)).logsumexp(dim=0)
    return (weights_SB.double()[..., None] * logits_SBV).sum(dim=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [3.0, 300.0], ids=["near", "beyond float32"])
@pytest.mark.parametrize("of_probabilities", [False, True])
@pytest.mark.parametrize("scales", [None, SCALES], ids=["plain", "scaled"])
def test_a_mixture_is_what_its_formula_says(
    scales: Tensor | None, of_probabilities: bool, spread: float, dtype: torch.dtype
) -> None:
    mixture = Mixture(scales, of_probabilities)
    weights_SB, logits = example(spread, dtype)
    wanted_BV = formula(weights_SB, logits, mixture)
    found_BV = fuse(weights_SB, logits, NUM_SHARED, mixture)
    torch.testing.assert_close(found_BV.double(), wanted_BV, atol=1e-6 + 1e-7 * spread, rtol=2e-6)
    assert torch.equal(found_BV.argmax(dim=-1), wanted_BV.argmax(dim=-1))
    assert found_BV.isfinite().all()


def test_tokens_that_all_think_impossible_keep_their_ranks() -> None:
    """Their probability is zero in float32; a grammar may leave no others."""
    logits = [torch.tensor([[0.0, -200.0, -300.0, -201.0]]), torch.tensor([[0.0, -250.0, -199.5, -400.0]])]
    found_V = fuse(torch.tensor([[0.5], [0.5]]), logits, 4, Mixture(None, True))[0]
    assert found_V.argsort(descending=True).tolist() == [0, 2, 1, 3]
    torch.testing.assert_close(found_V[1:], torch.tensor([-200.0, -199.5, -201.0]) - torch.tensor(2.0).log())


def test_a_weight_of_zero_leaves_the_others_distribution() -> None:
    weights_SB = torch.tensor([[1.0], [0.0]])
    logits = [torch.randn(1, 9), torch.tensor([[500.0, *[-500.0] * 8]])]
    found_BV = fuse(weights_SB, logits, 9, Mixture(None, True))
    torch.testing.assert_close(found_BV, logits[0].log_softmax(dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("of_probabilities", [False, True])
def test_a_logit_that_is_not_finite_shows_in_its_row_alone(of_probabilities: bool, value: float) -> None:
    """A distribution may have a probability of zero; what a model gives may not."""
    weights_SB, logits = example(300.0)
    logits[1][1, 7] = value
    found_BV = fuse(weights_SB, logits, NUM_SHARED, Mixture(None, of_probabilities))
    assert found_BV.isfinite().all(dim=-1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("of_probabilities", [False, True])
def test_gradients_are_the_formulas(of_probabilities: bool) -> None:
    """Also of rows in which a probability is zero in float32."""
    gradients = []
    for mix in (formula, lambda *own: fuse(own[0], own[1], NUM_SHARED, own[2])):
        weights_SB, logits = example(300.0)
        scales_S = SCALES.clone()
        leaves = [own.requires_grad_() for own in (weights_SB, scales_S, *logits)]
        mixed_BV = mix(weights_SB, logits, Mixture(scales_S, of_probabilities)).float()
        torch.nn.functional.cross_entropy(mixed_BV, torch.tensor([3, 1, 4, 1])).backward()
        gradients.append([own.grad for own in leaves])
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_mixed_probabilities_are_over_the_shared_ids_alone() -> None:
    weights_SB, logits = example(3.0)
    other = [torch.cat([own[:, :NUM_SHARED], own[:, NUM_SHARED:] + 100], dim=1) for own in logits]
    ours, theirs = (fuse(weights_SB, own, NUM_SHARED, Mixture(None, True)) for own in (logits, other))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours.exp().sum(dim=-1), torch.ones(4))
