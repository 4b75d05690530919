"""FSDP2 for fused training: specialists sharded over the processes by accelerate, the gate whole on each of them.

Asked for by accelerate's own configuration (`gating/accelerate/`). A specialist's decoder layers are units that are
gathered when they compute and dropped again; embeddings, final norms and output layers are gathered for a whole step,
as the loss needs all output layers at once. The gate is small and its arithmetic float32: it is not sharded, and its
gradients are averaged here. Knows modules; does not know what they compute.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ultrafuser.gating.errors import TrainError

if TYPE_CHECKING:
    from accelerate import Accelerator


def configure_sharding(accelerator: "Accelerator") -> None:
    """Make accelerate shard what it prepares from now on, if its configuration asks for FSDP.

    Raises:
        TrainError: the configuration has a setting with which the result would be wrong.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # Accelerate shards on devices of any kind but this one, though torch can.
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if state.distributed_type != DistributedType.FSDP:
        return
    plugin = state.fsdp_plugin
    for is_wrong, setting in (
        (plugin.fsdp_version != 2, "fsdp_version: must be 2"),
        (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading: must be false, the gate is not sharded"),
        (plugin.activation_checkpointing, "fsdp_activation_checkpointing: use --gradient-checkpointing instead"),
    ):
        if is_wrong:
            raise TrainError(f"{setting}; change it in accelerate's configuration")
    plugin.ignored_modules = "fusion_gate"
    # Accelerate's own policy also rounds gradients and the loss to bfloat16.
    is_bfloat16 = accelerator.mixed_precision == "bf16"
    plugin.mixed_precision_policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if is_bfloat16 else None
    )
    # Else the gradients of all parameters, not a shard of them, would be kept from one micro-batch to the next.
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Of parameters that every process has whole, over all processes; all must call it."""
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def drop_gathered(module: nn.Module) -> None:
    """Back to shards: a forward pass without a backward one leaves some parameters gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded; then all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy a whole tensor, the same in all processes, into a parameter or into this process's shard of it."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device)
        # No source rank: every process cuts its own shard from its own copy.
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)
