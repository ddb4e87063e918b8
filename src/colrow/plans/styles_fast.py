"""The fast styles: local tensors, tokens in a row, explicit collectives (see `ops.parallel_linear`).

[Note: tokens in a row]
Between blocks each rank holds tokens r t .. (r+1) t of all B T tokens of the micro-batch, whatever sequence they are
of, viewed as [B, T/n, D]. A gather of dimension 0 then gives the tokens in their order, and no copy is needed before
or after it; shards of dimension 1 would stand in the order of the ranks. Norms, residuals and products know no order.
Only where all styles agree is that right, so a plan that mixes these styles with ones that split dimension 1 is
refused.

`fast_gather` stands on the module whose projections share an input (`self_attn`, `mlp`). It gathers that input and
computes all of them at once; each projection, style `fast_colwise`, then takes its part out of what it is called with.
A projection that is called with anything else raises: the fast path ran, or there is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from colrow.errors import PlanError, did_you_mean
from colrow.ops.carriers import OVERLAPS, Overlap, carrier
from colrow.ops.float8 import KINDS
from colrow.ops.parallel_linear import CHUNK_ROWS, column_linear, row_linear
from colrow.parallel.local_view import View, replace_forward, view_parameters
from colrow.plans.site import Site
from colrow.plans.styles import Colwise, ParameterLayout, Rowwise, Style, _require
from colrow.plans.styles_local import KvReplicate, _same_on_all_ranks, rank_table, summed

FAST = "_colrow_fast"  # module attribute: what the module's fast forward needs


class Columns:
    """What a fast_gather hands to its module in the place of the input: the projections' outputs.

    It has the whole input's shape, which code may ask for, and nothing else that a tensor has.
    """

    def __init__(self, parts: dict[str, Tensor], shape: tuple[int, ...]) -> None:
        self.parts = parts
        self.shape = shape


class FastStyle(ParallelStyle):
    """Places parameters, views them locally, and lets a function take the forward's place."""

    def __init__(
        self,
        placements: dict[str, Placement],
        views: dict[str, View],
        forward: Callable[..., Any],
        facts: Callable[[DeviceMesh], Any],
        late_views: Callable[[DeviceMesh], dict[str, View]] | None = None,
    ) -> None:
        self.placements, self.views, self.forward = placements, views, forward
        self.facts, self.late_views = facts, late_views

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, param in list(module.named_parameters(recurse=False)):
            placed = distribute_tensor(param.detach(), device_mesh, [self.placements[name]])
            module.register_parameter(name, nn.Parameter(placed, requires_grad=param.requires_grad))
        view_parameters(module, self.late_views(device_mesh) if self.late_views else self.views)
        module.__dict__[FAST] = self.facts(device_mesh)
        replace_forward(module, self.forward)
        return module


def require_float8(kind: str) -> None:
    """Raise a PlanError for an option fp8 that names no kind."""
    if kind and kind not in KINDS:
        raise PlanError(f"fp8: {kind!r} is no kind of 8-bit products{did_you_mean(kind, KINDS)}")


def group_name(mesh: DeviceMesh) -> str:
    return str(mesh.get_group().group_name)


def check_overlap(site: Site, overlap: str) -> None:
    if overlap not in OVERLAPS:
        raise PlanError(
            f"{site.fqn}: overlap: {overlap!r} is none of {', '.join(OVERLAPS)}{did_you_mean(str(overlap), OVERLAPS)}"
        )


def prepare_overlap(mesh: DeviceMesh, overlap: str) -> None:
    """Make what carries chunks on this mesh: before the first step, so that what cannot be had is told at once."""
    if dist.get_backend(mesh.get_group()) != "fake":  # there nothing is sent
        on_gpu = mesh.device_type == "cuda"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device(mesh.device_type)
        carrier(overlap, group_name(mesh), device)


@dataclass(frozen=True, kw_only=True)
class FastGather(Style):
    """One all-gather and one product for the children named in `columns`, which have style fast_colwise or
    fast_kv_replicate. `keep_gathered: false` gathers the input again in backward instead of keeping it. `overlap` says
    what runs beside products (see `ops.carriers.Overlap`); chunks of fewer than `chunk_rows` rows are not cut.
    `fp8: tensorwise` or `rowwise` multiplies 8-bit floats (`ops.float8`)."""

    name = "fast_gather"
    token_order = "row"
    columns: tuple[str, ...] = ()
    keep_gathered: bool = True
    overlap: Overlap = "collectives"
    chunk_rows: int = CHUNK_ROWS
    fp8: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        require_float8(self.fp8)

    def check(self, site: Site) -> None:
        children = dict(site.module.named_children())
        for column in self.columns:
            if not isinstance(children.get(column), nn.Linear):
                raise PlanError(f"{site.fqn}: fast_gather names {column!r}, which is no linear child of it")
        if not self.columns:
            raise PlanError(f"{site.fqn}: style fast_gather needs the option columns, such as [gate_proj, up_proj]")
        check_overlap(site, self.overlap)

    def build(self, site: Site) -> ParallelStyle:
        return _GatherHook(self)


class _GatherHook(ParallelStyle):
    def __init__(self, style: FastGather) -> None:
        self.style = style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style, group, n = self.style, group_name(device_mesh), device_mesh.size()
        names, options = style.columns, (style.keep_gathered, style.overlap, style.chunk_rows, style.fp8)
        prepare_overlap(device_mesh, style.overlap)

        def gather(module: Any, args: Any, kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            B, t, D = x.shape
            projections = [module.get_submodule(name) for name in names]
            weights = [projection.weight for projection in projections]
            y = column_linear(x.reshape(B * t, D), weights, group, *options).view(B, t * n, -1)
            parts = dict(zip(names, y.split([w.shape[0] for w in weights], -1), strict=True))
            columns = Columns(parts, (B, t * n, D))
            return ((columns, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": columns})

        module.register_forward_pre_hook(gather, with_kwargs=True)
        return module


def take_column(module: Any, x: Any) -> Tensor:
    """The forward of a fast column: its part of what the parent has computed, and the bias."""
    name = getattr(module, FAST)
    if not isinstance(x, Columns) or name not in x.parts:
        raise PlanError(
            f"{name} has a fast column style and was called with {type(x).__name__}: its parent needs style "
            f"fast_gather with {name} in its option columns"
        )
    y = x.parts[name]
    bias = module.bias
    return y if bias is None else y + bias


@dataclass(frozen=True, kw_only=True)
class FastColwise(Style):
    """A linear whose output features are split, computed by its parent's fast_gather."""

    name = "fast_colwise"

    def check(self, site: Site) -> None:
        _require(site, self.name, nn.Linear)
        Colwise().check(site)

    def build(self, site: Site) -> ParallelStyle:
        names = dict(site.module.named_parameters(recurse=False))
        last = site.fqn.rpartition(".")[2]
        return FastStyle(
            dict.fromkeys(names, Shard(0)), dict.fromkeys(names, _same_on_all_ranks), take_column, lambda _: last
        )

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return Colwise().parameters(site)


@dataclass(frozen=True, kw_only=True)
class FastKvReplicate(KvReplicate):
    """`kv_replicate` for a projection that its parent's fast_gather computes."""

    name = "fast_kv_replicate"

    def build(self, site: Site) -> ParallelStyle:
        heads = self.resolve(site)
        if heads.kv % site.tp == 0:
            return FastColwise().build(site)
        names = dict(site.module.named_parameters(recurse=False))
        last = site.fqn.rpartition(".")[2]

        def views(mesh: DeviceMesh) -> dict[str, View]:
            mine = rank_table(mesh, [heads.kv_heads_of_rank(site.tp, rank) for rank in range(site.tp)])

            def rows(param: DTensor) -> Tensor:
                return summed(param).unflatten(0, (heads.kv, heads.dim)).index_select(0, mine).flatten(0, 1)

            return dict.fromkeys(names, rows)

        return FastStyle(dict.fromkeys(names, Replicate()), {}, take_column, lambda _: last, views)


def row_forward(module: Any, x_BTf: Tensor) -> Tensor:
    """The forward of a fast row linear: [B, T, f] -> this rank's tokens, [B, T/n, D]."""
    group, n, *options = getattr(module, FAST)
    B, T, f = x_BTf.shape
    y = row_linear(x_BTf.reshape(B * T, f), module.weight, group, *options).view(B, T // n, -1)
    bias = module.bias
    return y if bias is None else y + bias


@dataclass(frozen=True, kw_only=True)
class FastRowwise(Style):
    """A linear whose input features are split; its output is this rank's part of the tokens in a row. `overlap`,
    `chunk_rows` and `fp8` as in fast_gather."""

    name = "fast_rowwise"
    token_order = "row"
    overlap: Overlap = "collectives"
    chunk_rows: int = CHUNK_ROWS
    fp8: str = ""

    def __post_init__(self) -> None:
        require_float8(self.fp8)

    def check(self, site: Site) -> None:
        _require(site, self.name, nn.Linear)
        Rowwise().check(site)
        check_overlap(site, self.overlap)

    def build(self, site: Site) -> ParallelStyle:
        def facts(mesh: DeviceMesh) -> tuple[str, int, Overlap, int, str]:
            prepare_overlap(mesh, self.overlap)
            return group_name(mesh), mesh.size(), self.overlap, self.chunk_rows, self.fp8

        return FastStyle(
            {"weight": Shard(1), "bias": Replicate()},
            {"weight": _same_on_all_ranks, "bias": summed},  # each rank adds the bias to its own tokens
            row_forward,
            facts,
        )

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return Rowwise().parameters(site)
