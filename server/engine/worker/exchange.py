"""Where ranks of different specialists meet, if each specialist has ranks of its own.

A rank meets those that hold the same shard of the other specialists. Followers send to the leader, in the order of the
fusion file; the leader tells all. Knows ranks and tensors, not what they mean.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_world_group, init_model_parallel_group
from vllm.platforms import current_platform

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor that is to come."""


class Exchange:
    """One rank of every specialist, the leader's first."""

    def __init__(self, num_specialists: int, tensor_parallel_size: int) -> None:
        """Every rank of the world makes one, at the same time."""
        ranks = [
            [specialist * tensor_parallel_size + shard for specialist in range(num_specialists)]
            for shard in range(tensor_parallel_size)
        ]
        local_rank = get_world_group().local_rank
        self._group = init_model_parallel_group(ranks, local_rank, current_platform.dist_backend, group_name="exchange")

    def send(self, tensor: Tensor) -> None:
        """A follower's to the leader."""
        self._group.send(tensor.contiguous(), 0)

    def receive(self, kinds: Sequence[Kind]) -> list[Tensor]:
        """What each follower sends."""
        return [self._group.recv(torch.Size(shape), dtype, 1 + place) for place, (shape, dtype) in enumerate(kinds)]

    def tell(self, tensor: Tensor) -> Tensor:
        """The leader's to all, put into the followers' tensor of the same shape and type."""
        communicator = self._group.device_communicator
        assert communicator is not None
        told: Tensor = communicator.broadcast(tensor.contiguous(), 0)  # on a GPU in the stream of all the rest
        return told

    def tell_object(self, own: Any = None) -> Any:
        """The leader's to all: any object; what it is."""
        return self._group.broadcast_object(own, 0)

    def share(self, own: Any = None) -> list[Any]:
        """What each of them, the leader too, has for all: any object."""
        everyone: list[Any] = [None] * self._group.world_size
        torch.distributed.all_gather_object(everyone, own, group=self._group.cpu_group)
        return everyone
