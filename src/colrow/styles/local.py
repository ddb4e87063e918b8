"""colrow's own styles: modules whose arithmetic runs on local tensors.

Each keeps the module's parameters as DTensors under their own names and lets the module's forward see local ones
(see `sharding.local_view`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement
from torch.utils.weak import WeakTensorKeyDictionary

from colrow.errors import PlanError
from colrow.sharding.local_view import View, view_parameters
from colrow.styles.base import Colwise, ParameterLayout, Style, _Coerce, _one, _require, replicated
from colrow.styles.heads import Heads, heads_of
from colrow.styles.site import Site, divide

TABLES = WeakTensorKeyDictionary()
"""What `rank_table` made and is still in use: to whoever looks at one rank alone, nothing else shows that it is not the
same on all ranks."""


class LocalStyle(ParallelStyle):
    """Applies a style of the local kind: place the parameters, view them locally, prepare the first input."""

    def __init__(
        self,
        placements: dict[str, Placement],
        views: Callable[[DeviceMesh], dict[str, View]],
        input_layout: Placement | None = None,
    ) -> None:
        self.placements = placements
        self.views = views
        self.input_layout = input_layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        views = self.views(device_mesh)
        for name, param in list(module.named_parameters(recurse=False)):
            if isinstance(param, DTensor):  # another style placed it
                del views[name]
                continue
            placed = distribute_tensor(param.detach(), device_mesh, [self.placements[name]])
            module.register_parameter(name, nn.Parameter(placed, requires_grad=param.requires_grad))
        view_parameters(module, views)
        layout = self.input_layout
        if layout is not None:
            module.register_forward_pre_hook(lambda _, args: (whole_input(args[0], device_mesh, layout), *args[1:]))
        return module


def whole_input(x: Tensor, mesh: DeviceMesh, layout: Placement) -> Tensor:
    """The whole of `x` as a local tensor that each rank uses in its own way: its gradient is a sum over ranks."""
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [layout], run_check=False)
    if not x.placements[0].is_replicate():  # a redistribute that changes nothing would still reduce the gradient
        x = x.redistribute(placements=[Replicate()])
    return x.to_local(grad_placements=[Partial()])


def rank_table(mesh: DeviceMesh, rows: list[list[int]]) -> Tensor:
    """Row `rank` of `rows`, on the mesh's device. Rows are equally long."""
    table = torch.tensor(rows, device=mesh.device_type)
    mine = distribute_tensor(table, mesh, [Shard(0)], src_data_rank=None).to_local()[0]
    TABLES[mine] = True
    return mine


def summed(param: DTensor) -> Tensor:
    """The whole parameter, for use on this rank's part of the activations: gradients are summed over tp."""
    return param.to_local(grad_placements=[Partial()])


@dataclass(frozen=True, kw_only=True)
class KvReplicate(_Coerce, Style):
    """A k or v projection: split by kv heads where tp divides them; otherwise whole on each rank, which computes
    the kv heads that its query heads need. Gradients of a head are summed over the ranks that use it.

    `heads`, `kv_heads`, `head_dim` come from the model's config unless given.
    """

    name = "kv_replicate"
    _coerce: ClassVar[dict[str, Any]] = {"input": _one}
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    input: Placement | None = None

    def resolve(self, site: Site) -> Heads:
        """The head counts at this site. Raises PlanError when nobody states them, or they do not fit."""
        known = heads_of(site.model)
        query = self.heads or (known.query if known else None)
        kv = self.kv_heads or (known.kv if known else None)
        dim = self.head_dim or (known.dim if known else None)
        if query is None or kv is None or dim is None:
            raise PlanError(
                f"{site.fqn}: style kv_replicate needs the head counts and the model has no config that states them: "
                "give the options heads, kv_heads and head_dim"
            )
        module = _require(site, self.name, nn.Linear)
        if module.out_features != kv * dim:
            raise PlanError(
                f"{site.fqn}: out_features={module.out_features} is not kv_heads={kv} × head_dim={dim}: "
                "style kv_replicate is for k and v projections; correct kv_heads or head_dim"
            )
        divide(query, site.tp, f"{site.fqn}: n_heads={query}")
        return Heads(query, kv, dim)

    def check(self, site: Site) -> None:
        self.resolve(site)

    def build(self, site: Site) -> ParallelStyle:
        heads = self.resolve(site)
        if heads.kv % site.tp == 0:
            return Colwise(input=self.input).build(site)

        def views(mesh: DeviceMesh) -> dict[str, View]:
            mine = rank_table(mesh, [heads.kv_heads_of_rank(site.tp, rank) for rank in range(site.tp)])

            def rows(param: DTensor) -> Tensor:
                return summed(param).unflatten(0, (heads.kv, heads.dim)).index_select(0, mine).flatten(0, 1)

            return {name: rows for name, _ in site.module.named_parameters(recurse=False)}

        names = dict(site.module.named_parameters(recurse=False))
        return LocalStyle(dict.fromkeys(names, Replicate()), views, self.input or Replicate())

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        heads = self.resolve(site)
        if heads.kv % site.tp == 0:
            return Colwise().parameters(site)
        return replicated(site.module, f"n_kv_heads={heads.kv} not divisible by tp={site.tp}; gradients summed over tp")


@dataclass(frozen=True, kw_only=True)
class GradSum(Style):
    """Parameters whole on each rank but used on its part of the activations (q/k norms on local heads):
    forward is local, gradients are summed over tp."""

    name = "grad_sum"

    def build(self, site: Site) -> ParallelStyle:
        names = dict(site.module.named_parameters(recurse=False))
        return LocalStyle(dict.fromkeys(names, Replicate()), lambda _: dict.fromkeys(names, summed))

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return replicated(site.module, "used on this rank's part; gradients summed over tp")


@dataclass(frozen=True, kw_only=True)
class Replicated(Style):
    """Parameters whole on each rank and used alike on every rank: nothing is communicated. `parallelize` gives this
    style to every module that the plan leaves out, so that all parameters live on one mesh."""

    name = "replicate"

    def build(self, site: Site) -> ParallelStyle:
        names = dict(site.module.named_parameters(recurse=False))
        return LocalStyle(dict.fromkeys(names, Replicate()), lambda _: dict.fromkeys(names, same_on_all_ranks))

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return replicated(site.module, "not in the plan: whole on each rank")


def same_on_all_ranks(param: DTensor) -> Tensor:
    return param.to_local()
