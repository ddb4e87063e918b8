"""Data parallelism around a tensor-parallel model: FSDP2, replicas, or both (HSDP), and the compute precision.

FSDP2's mixed precision (bf16 compute over fp32 weights, fp32 gradients) is also used where nothing is sharded: with a
dp axis of one rank it costs a cast and no communication.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def apply_data_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    blocks: Iterable[nn.Module],
    *,
    param_dtype: torch.dtype | None,
    reshard_after_forward: bool,
) -> None:
    """Wrap each block, then the model, in place, after the tensor-parallel plan and before the optimizer.

    Args:
        mesh: has the axes dp_replicate, dp_shard and tp.
        blocks: modules whose parameters are gathered together.
        param_dtype: compute dtype; gradients are reduced in fp32 then. None computes in the parameters' dtype.
        reshard_after_forward: free gathered parameters after forward and gather them again in backward.
    """
    replicas, shards = mesh["dp_replicate"].size(), mesh["dp_shard"].size()
    if replicas * shards == 1 and param_dtype is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype is not None else None
    )
    if replicas > 1 and shards == 1:
        from torch.distributed._composable.replicate_with_fsdp import replicate

        for block in blocks:
            replicate(block, mesh=mesh["dp_replicate"], mp_policy=policy)
        replicate(model, mesh=mesh["dp_replicate"], mp_policy=policy)
        return
    axes = mesh["dp_replicate", "dp_shard"] if replicas > 1 else mesh["dp_shard"]
    for block in blocks:
        fully_shard(block, mesh=axes, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=axes, mp_policy=policy, reshard_after_forward=reshard_after_forward)
