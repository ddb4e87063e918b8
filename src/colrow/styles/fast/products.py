"""The fast styles of products: columns that a fast_gather computes, a column alone, and rows (see `styles_fast`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.errors import PlanError
from colrow.ops.linear_options import LinearOptions
from colrow.ops.parallel_linear import column_linear, row_linear
from colrow.styles.base import Colwise, ParameterLayout, Rowwise, Style
from colrow.styles.cuts import Cut, check_cuts, layouts
from colrow.styles.fast.common import (
    FAST,
    Columns,
    CutLinear,
    Products,
    group_name,
    last,
    out_in,
    prepare_overlap,
    require_product,
)
from colrow.styles.local import KvReplicate
from colrow.styles.packed import PackedColwise, PackedRowwise, _numbers
from colrow.styles.site import Site


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
class Column(Style):
    """A linear whose output features are split: as one, or as the `segments` of a fused weight, with the options of
    style packed_colwise."""

    segments: tuple[int, ...] | None = None
    whole: tuple[int, ...] | None = None
    kv: tuple[int, ...] | None = None
    heads: int | None = None
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        for name in ("segments", "whole", "kv"):
            object.__setattr__(self, name, _numbers(getattr(self, name)))

    def cuts(self, site: Site) -> dict[str, Cut]:
        """How each parameter is held."""
        names = ("segments", "whole", "kv", "heads", "kv_heads")
        return PackedColwise(**{name: getattr(self, name) for name in names}).cuts(site)

    def check(self, site: Site) -> None:
        require_product(site, self.name)
        if self.segments is None and isinstance(site.module, nn.Linear):
            Colwise().check(site)
        check_cuts(site, self.cuts(site))

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return layouts(site, self.cuts(site), "output features split")


@dataclass(frozen=True, kw_only=True)
class FastColwise(Column):
    """A linear whose output features are split, computed by the fast_gather of a module around it. For the options
    see `Column`."""

    name = "fast_colwise"

    def build(self, site: Site) -> ParallelStyle:
        key = last(site.fqn)
        return CutLinear(self.cuts(site), take_column, lambda _: key)


@dataclass(frozen=True, kw_only=True)
class FastKvReplicate(KvReplicate):
    """`kv_replicate` for a projection that the fast_gather of a module around it computes."""

    name = "fast_kv_replicate"

    def build(self, site: Site) -> ParallelStyle:
        heads = self.resolve(site)
        if heads.kv % site.tp == 0:
            return FastColwise().build(site)
        column = FastColwise(segments=(heads.kv * heads.dim,), kv=(0,), heads=heads.query, kv_heads=heads.kv)
        return column.build(site)


def column_forward(module: Any, x: Tensor) -> Tensor:
    """The forward of a column that gathers for itself: this rank's tokens [..., t, D] -> [..., T, f]."""
    group, n, options = getattr(module, FAST)
    y = column_linear(x.flatten(0, -2), [out_in(module)], group, options)
    y = y.view(*x.shape[:-2], x.shape[-2] * n, -1)
    bias = module.bias
    return y if bias is None else y + bias


@dataclass(frozen=True, kw_only=True)
class FastColumn(Products, Column):
    """A linear whose output features are split and which gathers its own input: one that has no sibling. For the
    options see `Column`, `Products` and `FastGather`."""

    name = "fast_column"
    keep_gathered: bool = True

    def __post_init__(self) -> None:
        Products.__post_init__(self)
        Column.__post_init__(self)

    def check(self, site: Site) -> None:
        Products.check(self, site)
        Column.check(self, site)

    def build(self, site: Site) -> ParallelStyle:
        def facts(mesh: DeviceMesh) -> tuple[str, int, LinearOptions]:
            prepare_overlap(mesh, self.overlap)
            return group_name(mesh), mesh.size(), self.linear_options

        return CutLinear(self.cuts(site), column_forward, facts)


def row_forward(module: Any, x: Tensor) -> Tensor:
    """The forward of a fast row linear: [..., T, f] -> this rank's tokens, [..., t, D]."""
    group, n, options = getattr(module, FAST)
    y = row_linear(x.flatten(0, -2), out_in(module), group, options).view(*x.shape[:-2], x.shape[-2] // n, -1)
    bias = module.bias
    return y if bias is None else y + bias


@dataclass(frozen=True, kw_only=True)
class FastRowwise(Products):
    """A linear whose input features are split, as one or as `segments` one after another; its output is this rank's
    part of the tokens in a row. For the other options see `Products`."""

    name = "fast_rowwise"
    segments: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "segments", _numbers(self.segments))

    def cuts(self, site: Site) -> dict[str, Cut]:
        """How each parameter is held."""
        cuts = PackedRowwise(segments=self.segments).cuts(site)
        if "bias" in cuts:
            cuts["bias"] = Cut()  # each rank adds it to its own tokens
        return cuts

    def check(self, site: Site) -> None:
        require_product(site, self.name)
        if self.segments is None and isinstance(site.module, nn.Linear):
            Rowwise().check(site)
        check_cuts(site, self.cuts(site))
        super().check(site)

    def build(self, site: Site) -> ParallelStyle:
        def facts(mesh: DeviceMesh) -> tuple[str, int, LinearOptions]:
            prepare_overlap(mesh, self.overlap)
            return group_name(mesh), mesh.size(), self.linear_options

        return CutLinear(self.cuts(site), row_forward, facts)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return layouts(site, self.cuts(site), "input features split")
