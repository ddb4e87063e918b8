"""Data parallelism around a tensor-parallel model: FSDP2, replicas, or both (HSDP), and the compute precision.

[Note: FSDP2 units]
A unit is what FSDP2 all-gathers before its forward and reduce-scatters after its backward, as one. Each block is a
unit; the final norm and the head are one, gathered while the last block runs; the root unit holds what is left, which
is the embedding. A parameter belongs to one unit, so a weight that embedding and head share stays in the root.

FSDP2's mixed precision (bf16 compute over fp32 weights, fp32 gradients) is also used where nothing is sharded: with a
dp axis of one rank it costs a cast and no communication. See [Note: precision].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from colrow.errors import ConfigError
from colrow.mesh import MeshAxes
from colrow.parallel.used_parameters import agree_on_used_parameters
from colrow.sharding.local_view import PARAMETER_ATTRIBUTES
from colrow.sharding.parameter_state import ParameterState, refuse_hooks, set_states, states_of
from colrow.torch_compat import replicas_of_fsdp2

_KEEP_GATHERED = "_colrow_keep_gathered"  # set on the root: gathered parameters stay until the last micro-batch


def apply_data_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    blocks: Iterable[nn.Module],
    *,
    param_dtype: torch.dtype | None,
    reshard_after_forward: bool | None = None,
) -> None:
    """Wrap each block, then the model, in place: after the plan, checkpointing and compile, before the optimizer.

    Parameters keep their names and the attributes that you set on them; each becomes a DTensor on the data axes and tp
    (on the data axes alone where tp is 1). Gradients are averaged over the data axes; a parameter that only some ranks
    used counts as zero on the others ([Note: used parameters]).

    Args:
        model: a model or a pipeline stage, on any device, the meta device too.
        mesh: has the axes dp_replicate and dp_shard, and may have others.
        blocks: modules whose parameters are gathered together, in the order in which they run.
        param_dtype: compute dtype; gradients are reduced and kept in fp32 then. None computes and reduces in the
            parameters' own dtype.
        reshard_after_forward: free a block's gathered parameters after its forward and gather them again for its
            backward. Unless given, where dp_shard > 1 and there is no pipeline, which would gather them again for
            every micro-batch.

    Raises:
        ConfigError: blocks share a parameter, or a parameter is a scalar or has a hook.
    """
    axes = MeshAxes(mesh)
    replicas, shards = axes.size("dp_replicate"), axes.size("dp_shard")
    if replicas * shards == 1 and param_dtype is None:
        return
    refuse_hooks(model, "FSDP2 (data parallelism, or compute precision)")
    refuse_scalars(model)
    states = states_of(model)
    blocks = list(blocks)
    head = head_unit(model, blocks)
    # reduce_dtype fp32: ranks' bf16 gradients are summed without rounding after each term
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype is not None else None
    )
    # Blocks first, the model last: FSDP2 gives a parameter to the innermost unit, and the root takes what is left.
    units: list[Any] = [*blocks, *([head] if head else []), model]
    replicates = replicas > 1 and shards == 1
    if replicates:
        replicate = replicas_of_fsdp2()
        for unit in units:
            replicate(unit, mesh=mesh["dp_replicate"], mp_policy=policy)
    else:
        data_mesh = mesh["dp_replicate", "dp_shard"] if replicas > 1 else mesh["dp_shard"]
        reshards = shards > 1 and axes.size("pp") == 1 if reshard_after_forward is None else reshard_after_forward
        for unit in units:
            # Backward begins with the head and ends with the root: had forward freed them, they would be gathered again
            # at once.
            frees = reshards and unit is not head and unit is not model
            fully_shard(unit, mesh=data_mesh, mp_policy=policy, reshard_after_forward=frees)
        model.__dict__[_KEEP_GATHERED] = not reshards
    _keep_attributes(model, states)
    agree_on_used_parameters(model, blocks, head, axes.data_groups())
    if shards > 1:
        _prefetch(model, blocks, head)


def refuse_scalars(model: nn.Module) -> None:
    """Raises ConfigError where a parameter has no dim, which FSDP2 cannot shard."""
    scalars = [name for name, param in model.named_parameters() if param.ndim == 0]
    if scalars:
        raise ConfigError(
            f"{', '.join(scalars[:4])}: a parameter without dims, which FSDP2 (data parallelism, or compute precision) "
            "cannot shard: make it one of one element, torch.ones(1)"
        )


def set_last_micro_batch(model: nn.Module, last: bool) -> None:
    """Before a micro-batch's forward: whether its backward reduces the gradients summed so far.

    Without this call each backward reduces. Gradients of the earlier micro-batches are summed unreduced, in the
    reduction's dtype, so they take the size of all tp-local parameters until the last one. torch's pipeline schedules
    call the same themselves. Does nothing for a model that `apply_data_parallel` left as it was.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)
    if getattr(model, _KEEP_GATHERED, False):
        model.set_reshard_after_backward(last)


def head_unit(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The final norm and the head, where they share no parameter with the rest of the model; else nothing.

    Raises:
        ConfigError: a block shares a parameter with another block or with the rest.
    """
    inner = getattr(model, "model", None)  # Hugging Face keeps everything but the head in `model`
    named = [getattr(owner, name, None) for owner in (model, inner) for name in ("norm", "lm_head")]
    head = [module for module in named if isinstance(module, nn.Module)]
    in_blocks = {id(child) for block in blocks for child in block.modules()}
    in_head = {id(child) for module in head for child in module.modules()}
    rest = {
        id(param)
        for module in model.modules()
        if id(module) not in in_blocks | in_head
        for param in module.parameters(recurse=False)
    }
    # FSDP2 gives a parameter to one unit; another that uses it would find it freed
    seen = rest | {id(param) for module in head for param in module.parameters()}
    for i, block in enumerate(blocks):
        own = {id(param): name for name, param in block.named_parameters()}
        if shared := own.keys() & seen:
            raise ConfigError(
                f"block {i} shares its parameter {own[min(shared)]} with another unit, and data parallelism gathers "
                "each parameter in one unit: pass the modules that share it as one block"
            )
        seen |= own.keys()
    if any(id(param) in rest for module in head for param in module.parameters()):
        return []  # a tied head stays with the embedding, in the root
    return head


def _keep_attributes(model: nn.Module, states: Mapping[str, ParameterState]) -> None:
    """Give the sharded parameters the attributes of those that they replace, and the gathered ones at each forward."""
    set_states(model, states)
    for name in states:
        owner, _, _ = name.rpartition(".")
        model.get_submodule(owner).register_forward_pre_hook(_attributes_on_gathered)


def _attributes_on_gathered(module: nn.Module, args: Any) -> None:
    # FSDP2 registers another tensor for the forward; its own hook, prepended, has gathered by now
    for leaf, attributes in getattr(module, PARAMETER_ATTRIBUTES, {}).items():
        param = module._parameters[leaf]
        assert param is not None
        param.__dict__.update(attributes)


def _prefetch(model: nn.Module, blocks: list[nn.Module], head: list[nn.Module]) -> None:
    """All-gather the next unit's parameters before this one computes. FSDP2's backward does so by itself; its forward
    would start only when the next unit begins, too late where a block's kernels are shorter than their launches."""
    units: list[Any] = [model, *blocks, *head[:1]]
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
