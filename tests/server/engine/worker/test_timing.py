"""Parts of a step are timed by name, and handed out once, without waiting for any of them."""

import time

import pytest
import torch

from ultrafuser.server.engine.worker.timing import StepClock


def test_parts_are_handed_out_once_in_order() -> None:
    clock = StepClock(torch.device("cpu"))
    start = time.perf_counter()
    with clock.forward("text", num_tokens=5, num_requests=2):
        time.sleep(0.02)
    with clock.forward("code", num_tokens=2, num_requests=2):
        pass
    with clock.forward("math", num_tokens=0, num_requests=0):
        pass
    with clock.measure("gate"):
        pass
    whole = time.perf_counter() - start
    first, *others = clock.take()
    assert (first.part, first.specialist) == ("prefill", "text")
    assert first.seconds >= 0.02
    assert [(span.part, span.specialist) for span in others] == [("decode", "code"), ("gate", None)]
    assert all(span.seconds >= 0 for span in others)
    assert first.seconds + sum(span.seconds for span in others) <= whole
    assert clock.take() == []


def test_a_clock_that_nobody_asks_does_not_grow() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(1000):
        with clock.measure("mix"):
            pass
    assert len(clock.take()) < 500


@pytest.mark.requires_cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_only_what_has_ended_is_handed_out() -> None:
    clock = StepClock(torch.device("cuda"))
    matrix = torch.randn(4096, 4096, device="cuda")
    with clock.measure("mix"):
        for _ in range(200):
            matrix = matrix @ matrix / 64
    assert clock.take() == [], "the host is far ahead of the device"
    torch.cuda.synchronize()
    (span,) = clock.take()
    assert 0 < span.seconds < 10
