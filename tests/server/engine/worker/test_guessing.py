"""What may be guessed where a request limits what may be drawn."""

import pytest
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

from ultrafuser.server.engine.worker import guessing
from ultrafuser.server.engine.worker.guessing import Draw, _Limits

FREE = Draw(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seeds=[0])


def logits(num_rows: int) -> torch.Tensor:
    """Random ones of a vocabulary that has no more tokens than there are candidates."""
    return 3 * torch.randn(num_rows, 100, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("min_p", [0.0, 0.1])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (1.0, 7), (0.5, 3), (0.01, 0), (0.8, 500), (1.0, 0)])
def test_limits_are_the_samplers(top_p: float, top_k: int, min_p: float) -> None:
    scaled_QV = logits(4)
    limits = _Limits([FREE._replace(top_p=top_p, top_k=top_k, min_p=min_p)] * 4)
    probs = scaled_QV.softmax(dim=-1)
    likely_QV = scaled_QV.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -torch.inf)
    k = torch.full((4,), min(top_k or 100, 100))
    assert torch.equal(limits.apply(scaled_QV), apply_top_k_top_p_pytorch(likely_QV, k, torch.full((4,), top_p)))


def test_rows_without_limits_stay_whole_beside_others() -> None:
    scaled_QV = logits(2)
    limited, whole = _Limits([FREE._replace(top_k=1), FREE]).apply(scaled_QV)
    assert (limited.isfinite().sum(), limited.argmax()) == (1, scaled_QV[0].argmax())
    assert torch.equal(whole, scaled_QV[1])


def test_of_a_large_vocabulary_the_likeliest_are_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guessing, "NUM_CANDIDATES", 10)
    scaled_QV = logits(1)
    kept = _Limits([FREE._replace(top_p=0.999)]).apply(scaled_QV).isfinite().nonzero()[:, 1].tolist()
    assert len(kept) > 5
    assert set(kept) <= set(scaled_QV.topk(10).indices[0].tolist())
