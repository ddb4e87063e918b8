"""Weights of a model that was built on the meta device: memory for them, and their seeded initial values."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from colrow.errors import ConfigError
from colrow.models.huggingface import name_from_huggingface, stored_name
from colrow.models.init import init_tensor
from colrow.parallel.parallelize import tie, tied_parameters
from colrow.sharding.layout import held_regions, local_tensor, packed_of, unwrapped_name
from colrow.sharding.parameter_state import kept_states
from colrow.torch_compat import apply_to_tensors


def shard_evenly(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard every parameter of a model on the meta device along its first dimension over a 1-D mesh, in place.

    For ranks that only read and write weights together: no forward works on such a model.
    """
    ties = tied_parameters(model)
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            # None: there are no values to send
            placed = distribute_tensor(param.detach(), mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(placed, requires_grad=param.requires_grad))
    tie(model, ties)
    return model


def materialize(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Give memory on `device` to every parameter that is on the meta device, in place; what has values is moved.

    The values are arbitrary until they are filled. Tied parameters stay tied, DTensors keep their placements, and a
    model may be wrapped by FSDP2 or not.

    Raises:
        ConfigError: a buffer is on the meta device, and nothing would fill it.
    """
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if lost:
        raise ConfigError(
            f"the values of buffer {lost[0]}{f' and {len(lost) - 1} more' if len(lost) > 1 else ''} were lost on the "
            "meta device: build the model on the CPU, or move its parameters alone to the meta device"
        )
    ties = tied_parameters(model)  # _apply makes a new tensor under each name
    with kept_states(model):
        apply_to_tensors(model, lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        tie(model, ties)
    return model


@torch.no_grad()
def fill_seeded(model: nn.Module, seed: int) -> None:
    """Write the initial value of each parameter. A rank computes the shards that it holds and communicates nothing.

    A value depends on (seed, the parameter's fully qualified name, its index in the unsharded tensor) alone, so all
    meshes start from the same bits. A tied head takes the embedding's, also on a pipeline stage without an embedding.

    Raises:
        ConfigError: the model has no config with num_hidden_layers, a parameter that no rule knows, or one that is
            still on the meta device.
    """
    config = getattr(model, "config", None)
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ConfigError(
            f"{type(model).__name__} has no config.num_hidden_layers, by which initial values are scaled: "
            "initialise the model in the callable that builds it, or start from a folder of weights"
        )
    tied = bool(getattr(config, "tie_word_embeddings", False))
    filled: set[int] = set()
    # Not named_parameters(): FSDP2's state_dict hook reshards first, so that the shards are written and not a gathered
    # copy that the next forward would drop.
    for fqn, param in model.state_dict(keep_vars=True).items():
        if not isinstance(param, nn.Parameter) or id(param) in filled:
            continue
        filled.add(id(param))
        if param.is_meta:
            raise ConfigError(f"{fqn} is on the meta device: call materialize(model, device) before its initial values")
        name = stored_name(name_from_huggingface(unwrapped_name(fqn)), tied)
        local = local_tensor(param.detach())
        for region, place in held_regions(param, packed_of(model, fqn)).items():
            local[place.slices].copy_(
                init_tensor(name, param.shape, seed, local.device, config, offset=region.offset, size=region.size)
            )
