"""Styles for fused weights, stacked experts, and blocks that run on local tensors.

A fused weight is a concatenation of segments (q, k and v; gate and up). Cut as one it would give a rank half of q and
none of v; here each segment is cut on its own and a rank holds one part of each. The global parameter stays whole in
name and shape; `Packed` on the module tells init, import, checkpoint and export which rows a rank has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from colrow.errors import PlanError
from colrow.parallel.layout import Packed
from colrow.parallel.local_view import View, view_parameters
from colrow.plans.heads import Heads
from colrow.plans.site import Site, divide
from colrow.plans.styles import ParameterLayout, Style, _Coerce, _many, _named, _one
from colrow.plans.styles_local import rank_table, summed


@dataclass(frozen=True)
class Cut:
    """How one parameter is held: `dim` is cut into `segments`, those at the positions `whole` stay whole on each rank.
    Of those at the positions `kv` a rank uses the kv heads that its query heads need: there are `kv_heads` for `heads`
    query heads, and tp does not divide them.

    Without a dim the parameter is whole; then `scaled` says that it is added on every rank to a partial sum and so
    must be divided by tp.
    """

    dim: int | None = None
    segments: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()
    scaled: bool = False
    kv: tuple[int, ...] = ()
    heads: int = 0
    kv_heads: int = 0

    @property
    def uneven(self) -> bool:
        """Whether every rank holds the whole parameter, and uses its part of it."""
        return bool(self.whole or self.kv)

    def rows(self, tp: int, rank: int) -> list[int]:
        """Global indices of `dim` that a rank uses, in its order."""
        out: list[int] = []
        start = 0
        for position, size in enumerate(self.segments):
            if position in self.kv:
                width = size // self.kv_heads
                for head in Heads(self.heads, self.kv_heads, width).kv_heads_of_rank(tp, rank):
                    out += range(start + head * width, start + (head + 1) * width)
                start += size
                continue
            part = size if position in self.whole else size // tp
            first = start if position in self.whole else start + rank * part
            out += range(first, first + part)
            start += size
        return out

    def layout(self, param: Tensor, tp: int, reason: str) -> ParameterLayout:
        shape = tuple(param.shape)
        if self.dim is None:
            return ParameterLayout(
                Replicate(), shape, "added to a sum over ranks, 1/tp on each" if self.scaled else reason
            )
        if self.uneven:
            return ParameterLayout(
                Replicate(), shape, f"{reason}: not all segments divide; whole, gradients summed over tp"
            )
        local = (*shape[: self.dim], shape[self.dim] // tp, *shape[self.dim + 1 :])
        packed = Packed(self.dim, self.segments) if len(self.segments) > 1 else None
        return ParameterLayout(Shard(self.dim), local, reason, packed)

    def check(self, site: Site, name: str, extent: int) -> None:
        if sum(self.segments) != extent:
            raise PlanError(
                f"{site.fqn}.{name}: segments {list(self.segments)} sum to {sum(self.segments)}, but dim {self.dim} "
                f"has {extent}: give the sizes of the fused parts in order"
            )
        for position, size in enumerate(self.segments):
            if position in self.kv:
                if not self.kv_heads or size % self.kv_heads:
                    raise PlanError(
                        f"{site.fqn}.{name}: segment {position} of size {size} does not hold kv_heads={self.kv_heads}: "
                        "give heads and kv_heads as the model has them"
                    )
                divide(self.heads, site.tp, f"{site.fqn}.{name}: heads={self.heads}")
            elif position not in self.whole:
                divide(size, site.tp, f"{site.fqn}.{name}: segment {position} of size {size}")

    def distribute(self, param: Tensor, mesh: DeviceMesh) -> DTensor:
        """The DTensor whose local part is a part of each segment."""
        data = param.detach()
        if self.dim is None or self.uneven:
            return distribute_tensor(data, mesh, [Replicate()])
        if len(self.segments) > 1:
            order = [row for rank in range(mesh.size()) for row in self.rows(mesh.size(), rank)]
            data = data.index_select(self.dim, torch.tensor(order, device=data.device))
        return distribute_tensor(data, mesh, [Shard(self.dim)])

    def view(self, mesh: DeviceMesh) -> View:
        """What the module's forward sees."""
        tp = mesh.size()
        if self.dim is None:
            return (lambda param: summed(param) / tp) if self.scaled else summed
        if not self.uneven:
            return lambda param: param.to_local()
        dim, mine = self.dim, rank_table(mesh, [self.rows(tp, rank) for rank in range(tp)])
        return lambda param: summed(param).index_select(dim, mine)


_IN_BLOCK = "_colrow_in_block"
"""Marks the modules of a `local_block`: it hands local tensors over and sums their gradients at its entry."""


class CutStyle(ParallelStyle):
    """Distributes parameters by their cuts, and brings the first input and the output to the layouts asked for.

    `outside` is the layout of the input where nobody gives one and no block around prepares it.
    """

    def __init__(
        self,
        cuts: dict[str, Cut],
        input: Placement | None,
        output: Placement | None,
        partial: bool,
        outside: Placement | None = None,
    ) -> None:
        self.cuts, self.input, self.output, self.partial = cuts, input, output, partial
        self.outside = outside

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        mesh = device_mesh
        place(module, mesh, self.cuts)
        given, wanted, partial = self.input, self.output, self.partial
        if given is None and not getattr(module, _IN_BLOCK, False):
            given = self.outside

        def before(_: nn.Module, args: Any) -> Any:
            return (local_input(args[0], mesh, given, whole=not partial), *args[1:])

        module.register_forward_pre_hook(before)
        if partial and wanted is not None and not wanted.is_partial():
            module.register_forward_hook(lambda _, __, out: reduced(out, mesh, wanted))
        return module


def place(module: nn.Module, mesh: DeviceMesh, cuts: dict[str, Cut]) -> None:
    """Distribute the module's parameters by their cuts, and let its forward see this rank's parts."""
    views = {}
    for name, cut in cuts.items():
        param = module._parameters[name]
        assert param is not None
        if isinstance(param, DTensor):  # another style placed it
            continue
        placed = cut.distribute(param, mesh)
        module.register_parameter(name, nn.Parameter(placed, requires_grad=param.requires_grad))
        views[name] = cut.view(mesh)
    if views:
        view_parameters(module, views)


def local_input(x: Any, mesh: DeviceMesh, layout: Placement | None, whole: bool) -> Any:
    """`x` as a local tensor. `whole`: gathered where it is split, its gradient a sum over ranks; otherwise the
    rank's own shard of the last dimension."""
    if not isinstance(x, DTensor):
        if layout is None or not isinstance(x, Tensor):
            return x
        x = DTensor.from_local(x, mesh, [layout], run_check=False)
    if whole:
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return x.redistribute(placements=[Shard(x.ndim - 1)]).to_local()


def reduced(out: Any, mesh: DeviceMesh, layout: Placement) -> Any:
    """The sum over ranks of `out`, in `layout`."""
    if isinstance(out, DTensor):
        out = out.to_local(grad_placements=[Replicate()])
    return _Reduce.apply(out, mesh, layout.dim if isinstance(layout, Shard) else None)


class _Reduce(torch.autograd.Function):
    """y = sum over ranks of x, whole or a shard of one dimension.

    forward   y = all_reduce(x)      or  reduce_scatter(x)
    backward  dx = dy                or  all_gather(dy)

    The result is a tensor of its own, so that a model may add to it in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, dim: int | None) -> Tensor:
        ctx.mesh, ctx.dim = mesh, dim
        if dim is None:
            return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", mesh))
        if x.shape[dim] % mesh.size():
            raise PlanError(
                f"extent {x.shape[dim]} of dim {dim} is not divisible by tp={mesh.size()}: pad the sequence"
            )
        return funcol.wait_tensor(funcol.reduce_scatter_tensor(x.contiguous(), "sum", dim, mesh))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = gradients
        if ctx.dim is not None:
            dy = funcol.wait_tensor(funcol.all_gather_tensor(dy.contiguous(), ctx.dim, ctx.mesh))
        return dy, None, None


def _weight_dims(site: Site, style: str) -> tuple[int, int]:
    """Dimensions of output and input features of the weight: (0, 1) for a Linear, (1, 0) for transformers' Conv1D."""
    module: Any = site.module
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        raise PlanError(
            f"{site.fqn}: style {style} is for a module with a two-dimensional weight, not {type(module).__name__}"
        )
    return (1, 0) if is_transposed(module) else (0, 1)


def is_transposed(module: nn.Module) -> bool:
    """Whether weights are [in, out]: transformers' Conv1D, and stacked experts that say so."""
    if isinstance(module, nn.Linear):
        return False
    return hasattr(module, "nf") or bool(getattr(module, "is_transposed", False))


def _numbers(value: Any) -> Any:
    return None if value is None else tuple(int(n) for n in value)


@dataclass(frozen=True, kw_only=True)
class PackedColwise(_Coerce, Style):
    """Linear or Conv1D whose output features are `segments` one after another, each split over tp. Those at the
    positions `whole` are computed by every rank (the one k and v head of multi-query attention); of those at the
    positions `kv`, which hold `kv_heads` for `heads` query heads, a rank computes what its query heads need.

    `input` is the layout of x outside; unless given, x comes as the enclosing `local_block` hands it over, and without
    one it is whole on each rank.
    """

    name = "packed_colwise"
    _coerce: ClassVar[dict[str, Any]] = {"input": _one, "segments": _numbers, "whole": _numbers, "kv": _numbers}
    segments: tuple[int, ...] | None = None
    whole: tuple[int, ...] | None = None
    kv: tuple[int, ...] | None = None
    heads: int | None = None
    kv_heads: int | None = None
    input: Placement | None = None

    def cuts(self, site: Site) -> dict[str, Cut]:
        out, _ = _weight_dims(site, self.name)
        weight: Any = site.module._parameters["weight"]
        segments = self.segments or (int(weight.shape[out]),)
        uneven: dict[str, Any] = {
            "whole": self.whole or (),
            "kv": self.kv or (),
            "heads": self.heads or 0,
            "kv_heads": self.kv_heads or 0,
        }
        cuts = {"weight": Cut(out, segments, **uneven)}
        if site.module._parameters.get("bias") is not None:
            cuts["bias"] = Cut(0, segments, **uneven)
        return cuts

    def check(self, site: Site) -> None:
        check_cuts(site, self.cuts(site))

    def build(self, site: Site) -> ParallelStyle:
        return CutStyle(self.cuts(site), self.input, None, partial=False, outside=Replicate())

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return layouts(site, self.cuts(site), "output features split, segment by segment")


@dataclass(frozen=True, kw_only=True)
class PackedRowwise(_Coerce, Style):
    """Linear or Conv1D whose input features are `segments` one after another, each split over tp; the output is a sum
    over ranks, brought to `output` (`partial` leaves the sum to the enclosing block)."""

    name = "packed_rowwise"
    _coerce: ClassVar[dict[str, Any]] = {"output": _one, "segments": _numbers}
    segments: tuple[int, ...] | None = None
    output: Placement | None = None

    def cuts(self, site: Site) -> dict[str, Cut]:
        _, into = _weight_dims(site, self.name)
        weight: Any = site.module._parameters["weight"]
        cuts = {"weight": Cut(into, self.segments or (int(weight.shape[into]),))}
        if site.module._parameters.get("bias") is not None:
            cuts["bias"] = Cut(scaled=True)
        return cuts

    def check(self, site: Site) -> None:
        check_cuts(site, self.cuts(site))

    def build(self, site: Site) -> ParallelStyle:
        return CutStyle(self.cuts(site), None, self.output or Replicate(), partial=True)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return layouts(site, self.cuts(site), "input features split, segment by segment")


@dataclass(frozen=True, kw_only=True)
class LocalShards(_Coerce, Style):
    """Any module whose own parameters are split as `shards` says: name to dim, or to {dim, segments, whole}. Its
    forward runs on the parts. For stacked experts: `{gate_up_proj: {dim: 1, segments: [F, F]}, down_proj: 2}`.

    A parameter left out stays whole with its gradient summed; one that is added to a partial sum is
    `{scaled: true}`. `output` (default `partial`: left to the enclosing block) says what the output becomes when the
    module ends in a sum over ranks.
    """

    name = "local_shards"
    _coerce: ClassVar[dict[str, Any]] = {"output": _one, "input": _one}
    shards: dict[str, Any] | None = None
    input: Placement | None = None
    output: Placement | None = None

    def cuts(self, site: Site) -> dict[str, Cut]:
        return named_cuts(site, self.name, self.shards or {})

    def check(self, site: Site) -> None:
        check_cuts(site, self.cuts(site))

    def build(self, site: Site) -> ParallelStyle:
        return CutStyle(self.cuts(site), self.input, self.output, partial=self.output is not None)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return layouts(site, self.cuts(site), "split over tp; the module runs on its part")


def named_cuts(site: Site, style: str, shards: dict[str, Any]) -> dict[str, Cut]:
    """The cut of each of the module's own parameters, from what a plan says of some of them."""
    cuts = {}
    own = dict(site.module.named_parameters(recurse=False))
    for name in shards:
        if name not in own:
            raise PlanError(f"{site.fqn} has no parameter {name!r}: {style} can split {', '.join(own) or 'nothing'}")
    for name, param in own.items():
        said = shards.get(name)
        if isinstance(said, int):
            said = {"dim": said}
        if said is None:
            cuts[name] = Cut()
        elif said.get("scaled"):
            cuts[name] = Cut(scaled=True)
        else:
            dim = int(said["dim"])
            segments = tuple(said.get("segments") or (int(param.shape[dim]),))
            uneven = {key: tuple(said.get(key) or ()) for key in ("whole", "kv")}
            cuts[name] = Cut(dim, segments, **uneven, heads=said.get("heads", 0), kv_heads=said.get("kv_heads", 0))
    return cuts


def check_cuts(site: Site, cuts: dict[str, Cut]) -> None:
    for name, cut in cuts.items():
        param = site.module._parameters[name]
        assert param is not None
        if cut.dim is not None:
            cut.check(site, name, int(param.shape[cut.dim]))


def layouts(site: Site, cuts: dict[str, Cut], reason: str) -> dict[str, ParameterLayout]:
    out = {}
    for name, cut in cuts.items():
        param = site.module._parameters[name]
        assert param is not None
        out[name] = cut.layout(param, site.tp, reason)
    return out


@dataclass(frozen=True, kw_only=True)
class LocalBlock(_Coerce, Style):
    """A block (attention, MLP, mixture of experts) that runs on local tensors between one gather and one reduction.

    `input` and `input_kwargs` give the outside layout of the activations that the block uses in its own way on each
    rank: they are gathered where split, and their gradients summed over ranks, once. `none` leaves an argument as it
    is. `output` gives what each output that is a sum over ranks becomes; `none` for an output that is one already.
    `slices` cuts a constant argument to the rank's heads: `{alibi: {dim: 0, inner: 32}}` views dim 0 as [-1, 32] and
    keeps this rank's part of the 32.

    Inside, parameters that stay whole need the style `grad_sum`.
    """

    name = "local_block"
    _coerce: ClassVar[dict[str, Any]] = {"input": _many, "input_kwargs": _named, "output": _many}
    input: tuple[Placement | None, ...] | None = None
    input_kwargs: dict[str, Placement | None] | None = None
    output: tuple[Placement | None, ...] | None = None
    slices: dict[str, Any] | None = None
    shards: dict[str, Any] | None = None
    """The block's own parameters, as in `local_shards`."""

    def check(self, site: Site) -> None:
        check_cuts(site, named_cuts(site, self.name, self.shards or {}))
        for name, said in (self.slices or {}).items():
            divide(int(said["inner"]), site.tp, f"{site.fqn}: {said['inner']} parts of argument {name}")

    def build(self, site: Site) -> ParallelStyle:
        return _BlockStyle(self, named_cuts(site, self.name, self.shards or {}))

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return layouts(site, named_cuts(site, self.name, self.shards or {}), "used on this rank's part")


class _BlockStyle(ParallelStyle):
    def __init__(self, style: LocalBlock, cuts: dict[str, Cut]) -> None:
        self.style, self.cuts = style, cuts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style, mesh = self.style, device_mesh
        place(module, mesh, self.cuts)
        for inner in module.modules():
            setattr(inner, _IN_BLOCK, True)
        positional = dict(enumerate(style.input or ()))
        named, slices = style.input_kwargs or {}, style.slices or {}

        def arrange(key: int | str, value: Any) -> Any:
            layout = positional.get(key) if isinstance(key, int) else named.get(key)
            if layout is not None:
                value = local_input(value, mesh, layout, whole=True)
            said = slices.get(str(key))
            return value if said is None or not isinstance(value, Tensor) else _part(value, mesh, **said)

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return tuple(arrange(i, a) for i, a in enumerate(args)), {k: arrange(k, v) for k, v in kwargs.items()}

        def after(_: nn.Module, args: Any, out: Any) -> Any:
            wanted = style.output or ()
            if isinstance(out, Tensor):
                return reduced(out, mesh, wanted[0]) if wanted[0] is not None else out
            done = [reduced(o, mesh, w) if w is not None else o for o, w in zip(out, wanted, strict=False)]
            return type(out)([*done, *out[len(done) :]])

        module.register_forward_pre_hook(before, with_kwargs=True)
        if any(layout is not None for layout in style.output or ()):
            module.register_forward_hook(after)
        return module


@dataclass(frozen=True, kw_only=True)
class ShardedNorm(Style):
    """A norm over a last dimension that is itself split (q and k norms over all heads at once): weight and
    activations are shards, and the mean over the dimension is one small all-reduce."""

    name = "sharded_norm"

    def check(self, site: Site) -> None:
        for name, param in site.module.named_parameters(recurse=False):
            if param.dim() != 1:
                raise PlanError(f"{site.fqn}.{name}: style sharded_norm is for norms with one-dimensional parameters")
            divide(int(param.shape[0]), site.tp, f"{site.fqn}.{name}: width {param.shape[0]}")

    def build(self, site: Site) -> ParallelStyle:
        return _ShardedNormStyle()

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return {
            name: ParameterLayout(Shard(0), (int(param.shape[0]) // site.tp,), "split with the features that it scales")
            for name, param in site.module.named_parameters(recurse=False)
        }


class _ShardedNormStyle(ParallelStyle):
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, param in list(module.named_parameters(recurse=False)):
            placed = distribute_tensor(param.detach(), device_mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(placed, requires_grad=param.requires_grad))

        def before(_: nn.Module, args: Any) -> Any:
            x = args[0]
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, [Shard(x.ndim - 1)], run_check=False)
            return (x, *args[1:])

        def after(_: nn.Module, __: Any, out: DTensor) -> Tensor:
            return out.redistribute(placements=[Shard(out.ndim - 1)]).to_local()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        return module


def _part(x: Tensor, mesh: DeviceMesh, dim: int, inner: int) -> Tensor:
    """This rank's part of the `inner` minor factor of dimension `dim`."""
    mine = rank_table(
        mesh, [list(range(r * inner // mesh.size(), (r + 1) * inner // mesh.size())) for r in range(mesh.size())]
    )
    return x.unflatten(dim, (-1, inner)).index_select(dim + 1, mine).flatten(dim, dim + 1)
