"""The kernels that mix on a GPU give what torch's operations give on a CPU: on a GPU, and in Triton's interpreter."""

import os
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from ultrafuser.gating.model.mixture import PAPERS_MIXTURE, Mixture, fuse
from ultrafuser.server.engine.worker.observing import neutralize, observe

NAN, INFINITY = float("nan"), float("inf")
INTERPRETED = "TRITON_INTERPRET"

CASES = [
    # sizes of vocabularies, hidden sizes, shared ids, rows, type
    ((5000, 4800, 4700), (64, 100, 48), 4600, 17, torch.float32),
    ((5000, 4800, 4700), (64, 64, 64), 4700, 16, torch.bfloat16),
    ((300,), (64,), 300, 5, torch.float32),
    ((320, 328), (64, 32), 300, 6, torch.float32),
    ((2049, 2048, 3000), (64, 64, 64), 2048, 1, torch.float32),
    ((320, 328), (1, 1), 300, 6, torch.float32),  # sums in the place of hidden states
]


def compare(device: str) -> None:
    """Every case in every mixture, with values that are finite and with some that are not."""
    from ultrafuser.server.engine.worker.mix_kernel import mix_and_mark

    for seed, case in enumerate(CASES):
        scales_S = torch.tensor([1.5, 0.6, 1.0])[: len(case[0])]
        mixtures = [PAPERS_MIXTURE, Mixture(scales_S), Mixture(None, True), Mixture(scales_S, True)]
        for mixture in mixtures:
            for poison in (None, _poison):
                _compare(mix_and_mark, device, seed, *case, poison, mixture)


def _compare(
    mix_and_mark: Callable[..., tuple[Tensor, Tensor]],
    device: str,
    seed: int,
    vocab_sizes: Sequence[int],
    hidden_sizes: Sequence[int],
    num_shared: int,
    num_rows: int,
    dtype: torch.dtype,
    poison: Callable[[Tensor, list[Tensor], list[Tensor], int], None] | None,
    mixture: Mixture,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(num_rows, size, generator=generator).to(dtype) for size in hidden_sizes]
    logits = [torch.randn(num_rows, size, generator=generator).to(dtype) for size in vocab_sizes]
    logits = [(4 * own).round() / 4 for own in logits]  # with ties
    for own in logits[1:]:  # some specialists agree in some rows
        own[::2, :num_shared] = logits[0][::2, :num_shared]
    weights = (40 * torch.rand(len(vocab_sizes), num_rows, generator=generator)).softmax(0)  # one mostly leads
    if poison is not None and num_rows > 4:
        poison(weights, hidden, logits, num_shared)
    shared = [own[:, :num_shared] for own in logits]
    wanted = fuse(weights, shared, num_shared, mixture)
    marks, is_nonfinite = observe(weights, hidden, shared, wanted)
    neutralize(wanted, is_nonfinite)

    on_device = [own.to(device)[:, :num_shared] for own in logits]
    scales = None if mixture.scales_S is None else mixture.scales_S.to(device)
    mixed, found = mix_and_mark(
        weights.to(device),
        [own.to(device) for own in hidden],
        on_device,
        num_shared,
        vocab_sizes[0],
        mixture._replace(scales_S=scales),
    )
    mixed, found = mixed.cpu(), found.cpu()
    assert mixed.shape == (num_rows, vocab_sizes[0])
    tolerance = 1e-5 if mixture.of_probabilities else 1e-6  # exponentials of two programs
    torch.testing.assert_close(mixed[:, :num_shared], wanted, rtol=1e-6, atol=tolerance)
    assert mixed[:, num_shared:].isneginf().all()
    assert torch.equal(found[-1], marks[-1])
    is_finite = marks[-1] == 0
    assert torch.equal(found[:, is_finite], marks[:, is_finite])


def _poison(weights: Tensor, hidden: list[Tensor], logits: list[Tensor], num_shared: int) -> None:
    """One kind of it in each of the first rows; the fifth's is where nobody looks."""
    logits[-1][0, num_shared - 1] = NAN
    hidden[0][1, -1] = INFINITY
    weights[0, 2] = NAN
    logits[0][3, :num_shared:2] = -INFINITY
    if logits[0].shape[1] > num_shared:
        logits[0][4, num_shared] = NAN


@pytest.mark.requires_cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_they_give_what_torch_gives() -> None:
    compare("cuda")


@pytest.mark.requires_cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("of_probabilities", [False, True])
def test_a_gpu_is_never_waited_for(of_probabilities: bool) -> None:
    from ultrafuser.server.engine.worker.mix_kernel import mix_and_mark

    weights, hidden, logits = (torch.rand(2, 3, size, device="cuda") for size in (1, 64, 320))
    mixture = Mixture(torch.ones(2, device="cuda"), of_probabilities)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mix_and_mark(weights[:, :, 0], list(hidden), list(logits), 300, 320, mixture)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is installed with CUDA's packages only")
def test_in_the_interpreter_they_give_what_torch_gives() -> None:
    environment = {**os.environ, INTERPRETED: "1"}
    done = subprocess.run(
        [sys.executable, "-m", __name__], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    # vLLM hides Triton where there is no GPU.
    module = types.ModuleType("vllm.triton_utils")
    module.__dict__.update(triton=import_module("triton"), tl=import_module("triton.language"))
    sys.modules[module.__name__] = module
    compare("cpu")
