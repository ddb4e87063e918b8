"""How a parameter is cut segment by segment, and how activations enter and leave a module that runs on its part.

A fused weight is a concatenation of segments (q, k and v; gate and up). Cut as one it would give a rank half of q and
none of v; here each segment is cut on its own and a rank holds one part of each. The global parameter stays whole in
name and shape; `Packed` on the module tells init, import, checkpoint and export which rows a rank has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from colrow.errors import PlanError
from colrow.sharding.layout import Packed
from colrow.sharding.local_view import View, view_parameters
from colrow.styles.base import ParameterLayout
from colrow.styles.heads import Heads
from colrow.styles.local import rank_table, same_on_all_ranks, summed
from colrow.styles.site import Site, divide
from colrow.torch_compat import all_gather, all_reduce, reduce_scatter


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
            return same_on_all_ranks
        dim, mine = self.dim, rank_table(mesh, [self.rows(tp, rank) for rank in range(tp)])
        return lambda param: summed(param).index_select(dim, mine)


IN_BLOCK = "_colrow_in_block"
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
        if given is None and not getattr(module, IN_BLOCK, False):
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
            return all_reduce(x, mesh)
        if x.shape[dim] % mesh.size():
            raise PlanError(
                f"extent {x.shape[dim]} of dim {dim} is not divisible by tp={mesh.size()}: pad the sequence"
            )
        return reduce_scatter(x, dim, mesh)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = gradients
        if ctx.dim is not None:
            dy = all_gather(dy, ctx.dim, ctx.mesh)
        return dy, None, None


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
            cuts[name] = Cut(
                dim,
                segments,
                tuple(said.get("whole") or ()),
                kv=tuple(said.get("kv") or ()),
                heads=said.get("heads", 0),
                kv_heads=said.get("kv_heads", 0),
            )
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
