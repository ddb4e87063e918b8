"""The fast style of a head that gives logits: `fast_head`. For one that gives the loss see `styles.linear_head`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.ops.parallel_linear import column_linear
from colrow.styles.base import ParameterLayout
from colrow.styles.fast.linear import FORWARD_STATE, FastLinearStyle, FlattenedTokens, group_name, require_linear
from colrow.styles.fast.unflatten import unflatten_tokens
from colrow.styles.linear import Colwise
from colrow.styles.shards import ShardSpec
from colrow.styles.site import Site


@dataclass(frozen=True, kw_only=True)
class FastHead(FlattenedTokens):
    """A head sharded over the vocabulary, on flattened tokens. `gather` gives all logits to each rank, for loss
    replicated."""

    name = "fast_head"
    computes_module = True
    gather: bool = False

    def check(self, site: Site) -> None:
        require_linear(site, self.name)
        Colwise(use_local_output=False).check(site)

    def build(self, site: Site) -> ParallelStyle:
        specs = {name: ShardSpec(0, (param.shape[0],)) for name, param in site.module.named_parameters(recurse=False)}
        (vocab,) = specs["weight"].segments
        return FastLinearStyle(
            specs, _head_forward, lambda mesh: FastHeadState(mesh, group_name(mesh), vocab, gather=self.gather)
        )

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return Colwise().parameters(site)


@dataclass(frozen=True)
class FastHeadState:
    """What a fast head's forward needs."""

    mesh: DeviceMesh
    group: str
    vocab: int
    gather: bool


def _head_forward(module: Any, x_BtD: Tensor) -> Tensor:
    """The forward of a fast head: logits [B, T, V], sharded over the vocabulary as a DTensor, or on each rank."""
    state: FastHeadState = getattr(module, FORWARD_STATE)
    weight: Tensor = module.weight
    y_BTv = unflatten_tokens(column_linear(x_BtD.flatten(0, 1), [weight], state.group), x_BtD)
    if module.bias is not None:
        y_BTv = y_BTv + module.bias
    shape = torch.Size((*y_BTv.shape[:2], state.vocab))  # not v * n: see [Note: uneven vocabulary]
    stride = (shape[1] * shape[2], shape[2], 1)  # of the global tensor: from_local alone would take it to be v * n wide
    # run_check=False, here and elsewhere: a check compares all ranks' shapes, and broadcasts what is replicated
    logits = DTensor.from_local(y_BTv, state.mesh, [Shard(2)], run_check=False, shape=shape, stride=stride)
    return logits.redistribute(placements=[Replicate()]).to_local() if state.gather else logits
