"""Between host and device without waiting for what the device has been given before.

A plain `torch.tensor(..., device=...)` waits for all of it on a GPU. Knows tensors, not what they mean.
"""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(
    numbers: Sequence[int] | Sequence[Sequence[float]] | NDArray[Any],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """The numbers on the device, under way: there for all that comes later in the device's stream."""
    on_host = torch.tensor(numbers, dtype=dtype)
    if device.type != "cpu":
        on_host = on_host.pin_memory()  # only now: an array of numpy's cannot be pinned while it is read
    return on_host.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, under way: there once the device's stream has come as far as it is now."""
    if tensor.device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
