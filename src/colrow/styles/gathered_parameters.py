"""The style of a module that every rank runs alike, on parameters of which it holds a shard: `gathered_parameters`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.sharding.local_view import View, view_parameters
from colrow.styles.base import ParameterLayout, Style, replicated
from colrow.styles.rank_tensors import same_on_all_ranks
from colrow.styles.shards import ShardSpec, place_parameter
from colrow.styles.site import Site


@dataclass(frozen=True, kw_only=True)
class GatheredParameters(Style):
    """Any module that gets the same on every rank and gives it. Its own parameters are sharded as `shards` says, name
    to dim, and are gathered for its forward. That saves the memory of parameters, gradients and optimizer, and no
    computing: for what no other style splits (a bare matrix, an LSTM, a weight that code reads by a name of its own).
    """

    name = "gathered_parameters"
    shards: dict[str, int]

    def check(self, site: Site) -> None:
        for name, dim in self.shards.items():
            shape = site.parameter(name).shape
            if not 0 <= dim < len(shape):
                raise site.wrong_options(f"{name} of shape {list(shape)} has no dim {dim}", "name a dim that it has")
            site.divide(int(shape[dim]), "CR210", f"dim {dim} of {name}, of size {shape[dim]}")

    def build(self, site: Site) -> ParallelStyle:
        return _GatheredParametersStyle(self.shards)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        specs = {name: ShardSpec(dim, (site.parameter(name).shape[dim],)) for name, dim in self.shards.items()}
        layouts = {name: spec.layout(site.parameter(name), site.tp, _REASON) for name, spec in specs.items()}
        return replicated(site.module, "used alike on every rank") | layouts


_REASON = "sharded, and gathered for the module's forward"


class _GatheredParametersStyle(ParallelStyle):
    def __init__(self, shards: dict[str, int]) -> None:
        self.shards = shards

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        gathered, views = _Gathered(), dict[str, View]()
        for name, param in list(module.named_parameters(recurse=False)):
            dim = self.shards.get(name)
            spec = ShardSpec(summed=False) if dim is None else ShardSpec(dim, (param.shape[dim],))
            if place_parameter(module, name, device_mesh, spec, self.src_data_rank):
                views[name] = same_on_all_ranks if dim is None else partial(gathered.view, name)
        view_parameters(module, views)
        module.register_forward_pre_hook(gathered.begin)
        module.register_forward_hook(gathered.end, always_call=True)  # also where forward raises: it frees the memory
        return module


class _Gathered:
    """The gathered parameters of a module while its forward runs: a loop that reads one many times gathers it once."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, bool], Tensor] | None = None

    def begin(self, _: nn.Module, __: Any) -> None:
        self.kept = {}

    def end(self, _: nn.Module, __: Any, ___: Any) -> None:
        self.kept = None

    def view(self, name: str, param: DTensor) -> Tensor:
        """All of the parameter. Its gradient is equal on all ranks, and each keeps its shard of it."""
        if self.kept is None:  # read by code around the module
            return _complete(param)
        key = name, torch.is_grad_enabled()  # what is gathered under no_grad has no gradient
        if key not in self.kept:
            self.kept[key] = _complete(param)
        return self.kept[key]


def _complete(param: DTensor) -> Tensor:
    return param.redistribute(placements=[Replicate()]).to_local()
