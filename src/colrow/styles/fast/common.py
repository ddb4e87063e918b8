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
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.errors import PlanError, did_you_mean
from colrow.ops.carriers import OVERLAPS, Overlap, carrier
from colrow.ops.float8 import KINDS
from colrow.ops.linear_options import CHUNK_ROWS, LinearOptions, option_names
from colrow.ops.parallel_linear import column_linear
from colrow.sharding.local_view import replace_forward
from colrow.styles.base import Style
from colrow.styles.cuts import IN_BLOCK, Cut, place
from colrow.styles.packed import is_transposed
from colrow.styles.site import Site

FAST = "_colrow_fast"  # module attribute: what the module's fast forward needs


class Columns:
    """What a fast_gather hands to its module in the place of the input: the projections' outputs.

    It says of the whole input what code may ask for (shape, type, device) and has nothing else that a tensor has.
    """

    def __init__(self, parts: dict[str, Tensor], shape: tuple[int, ...], x: Tensor) -> None:
        self.parts, self.shape = parts, torch.Size(shape)
        self.dtype, self.device, self.ndim = x.dtype, x.device, len(shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim


class CutLinear(ParallelStyle):
    """Places a linear's parameters by their cuts, and lets a function take the forward's place."""

    def __init__(self, cuts: dict[str, Cut], forward: Callable[..., Any], facts: Callable[[DeviceMesh], Any]) -> None:
        self.cuts, self.forward, self.facts = cuts, forward, facts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        place(module, device_mesh, self.cuts)
        module.__dict__[FAST] = self.facts(device_mesh)
        replace_forward(module, self.forward)
        return module


def is_product(module: nn.Module) -> bool:
    """Whether the module's forward is a product with its weight and the addition of its bias: a Linear, or
    transformers' Conv1D. A subclass with a forward of its own may do more, which a fast style would leave out."""
    kind = type(module)
    if isinstance(module, nn.Linear):
        return kind.forward is nn.Linear.forward
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def require_product(site: Site, style: str) -> None:
    """Raise a PlanError for a module that is not `is_product`."""
    if not is_product(site.module):
        kind = type(site.module).__name__
        own = ", which has a forward of its own" if isinstance(site.module, nn.Linear) else ""
        raise PlanError(f"{site.fqn}: style {style} is for nn.Linear, not for {kind}{own}")


def out_in(module: Any) -> Tensor:
    """The local weight as [out, in]."""
    weight: Tensor = module.weight
    return weight.t() if is_transposed(module) else weight


def require_float8(kind: str) -> None:
    """Raise a PlanError for an option fp8 that names no kind."""
    if kind and kind not in KINDS:
        raise PlanError(f"fp8: {kind!r} is no kind of 8-bit products{did_you_mean(kind, KINDS)}")


def group_name(mesh: DeviceMesh) -> str:
    return str(mesh.get_group().group_name)


def prepare_overlap(mesh: DeviceMesh, overlap: str) -> None:
    """Make what carries chunks on this mesh: before the first step, so that what cannot be had is told at once."""
    if dist.get_backend(mesh.get_group()) != "fake":  # there nothing is sent
        on_gpu = mesh.device_type == "cuda"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device(mesh.device_type)
        carrier(overlap, group_name(mesh), device)


@dataclass(frozen=True, kw_only=True)
class Products(Style):
    """What styles that multiply have in common. `overlap` says what runs beside products (see `ops.carriers.Overlap`);
    chunks of fewer than `chunk_rows` rows are not cut. `fp8: tensorwise` or `rowwise` multiplies 8-bit floats
    (`ops.float8`)."""

    token_order = "row"
    overlap: Overlap = "collectives"
    chunk_rows: int = CHUNK_ROWS
    fp8: str = ""

    def __post_init__(self) -> None:
        require_float8(self.fp8)

    @property
    def linear_options(self) -> LinearOptions:
        return LinearOptions(**{name: getattr(self, name) for name in option_names() if hasattr(self, name)})

    def check(self, site: Site) -> None:
        if self.overlap not in OVERLAPS:
            raise PlanError(
                f"{site.fqn}: overlap: {self.overlap!r} is none of {', '.join(OVERLAPS)}"
                f"{did_you_mean(str(self.overlap), OVERLAPS)}"
            )


@dataclass(frozen=True, kw_only=True)
class FastGather(Products):
    """One all-gather and one product for the modules inside that `columns` names, which have style fast_colwise or
    fast_kv_replicate. `argument` is the gathered one's number or name: the first unless given, or `hidden_states`.
    `keep_gathered: false` gathers the input again in backward instead of keeping it. For the other options see
    `Products`."""

    name = "fast_gather"
    columns: tuple[str, ...] = ()
    argument: int | str | None = None
    keep_gathered: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "columns", tuple(self.columns))

    def check(self, site: Site) -> None:
        inside = dict(site.module.named_modules())
        for column in self.columns:
            if column not in inside or not is_product(inside[column]):
                raise PlanError(f"{site.fqn}: fast_gather names {column!r}, which is no linear child of it")
        if not self.columns:
            raise PlanError(f"{site.fqn}: style fast_gather needs the option columns, such as [gate_proj, up_proj]")
        if len({last(column) for column in self.columns}) < len(self.columns):
            raise PlanError(f"{site.fqn}: fast_gather names two columns that are called alike: give them styles alone")
        super().check(site)

    def build(self, site: Site) -> ParallelStyle:
        return _GatherHook(self, site.fqn)


def last(name: str) -> str:
    return name.rpartition(".")[2]


class _GatherHook(ParallelStyle):
    def __init__(self, style: FastGather, fqn: str) -> None:
        self.style, self.fqn = style, fqn

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style, group, n, fqn = self.style, group_name(device_mesh), device_mesh.size(), self.fqn
        names, options = style.columns, style.linear_options
        keys = [last(name) for name in names]
        prepare_overlap(device_mesh, style.overlap)
        for inner in module.modules():  # behind the columns all is a rank's own, and the gather's dual sums gradients
            setattr(inner, IN_BLOCK, True)

        def gather(module: Any, args: Any, kwargs: Any) -> Any:
            key = style.argument if style.argument is not None else 0 if args else "hidden_states"
            if not isinstance((x := argument_at(args, kwargs, key)), Tensor):
                raise PlanError(f"{fqn}: fast_gather finds no tensor as argument {key!r}: say which in argument")
            weights = [out_in(module.get_submodule(name)) for name in names]
            shape = (*x.shape[:-2], x.shape[-2] * n, x.shape[-1])
            y = column_linear(x.flatten(0, -2), weights, group, options).view(*shape[:-1], -1)
            parts = dict(zip(keys, y.split([w.shape[0] for w in weights], -1), strict=True))
            return with_argument(args, kwargs, key, Columns(parts, shape, x))

        module.register_forward_pre_hook(gather, with_kwargs=True)
        return module


def argument_at(args: Any, kwargs: Any, key: int | str) -> Any:
    """The argument of this number or name; None where there is none."""
    if isinstance(key, str):
        return kwargs.get(key)
    return args[key] if key < len(args) else None


def with_argument(args: Any, kwargs: Any, key: int | str, value: Any) -> Any:
    """The arguments with another value in that place."""
    if isinstance(key, str):
        return args, {**kwargs, key: value}
    return (*args[:key], value, *args[key + 1 :]), kwargs
