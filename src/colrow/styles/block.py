"""Styles for blocks that run on local tensors between one gather and one reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from colrow.errors import PlanError
from colrow.styles.base import ParameterLayout, Style, _Coerce, _many, _named
from colrow.styles.cuts import IN_BLOCK, Cut, check_cuts, layouts, local_input, named_cuts, place, reduced
from colrow.styles.local import rank_table
from colrow.styles.site import Site, divide


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
            setattr(inner, IN_BLOCK, True)
        positional = dict(enumerate(style.input or ()))
        named, slices = style.input_kwargs or {}, style.slices or {}

        def arrange(key: int | str, value: Any) -> Any:
            layout = positional.get(key) if isinstance(key, int) else named.get(key)
            if layout is not None:
                value = local_input(value, mesh, layout, whole=True)
            said = slices.get(str(key))
            return value if said is None or not isinstance(value, Tensor) else part_of_heads(value, mesh, **said)

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


def part_of_heads(x: Tensor, mesh: DeviceMesh, dim: int, inner: int) -> Tensor:
    """This rank's part of the `inner` minor factor of dimension `dim`."""
    mine = rank_table(
        mesh, [list(range(r * inner // mesh.size(), (r + 1) * inner // mesh.size())) for r in range(mesh.size())]
    )
    return x.unflatten(dim, (-1, inner)).index_select(dim + 1, mine).flatten(dim, dim + 1)
