"""Styles of modules whose own code runs on local tensors: `local_block`, between one gather and one reduction, and
`local_shards`, for a module inside such a block (stacked experts)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from colrow.sharding.placements import parse_placement
from colrow.styles.local_buffers import view_buffers
from colrow.styles.local_module import ShardedModuleStyle, local_input, mark_grads_summed_at_entry, sum_over_ranks
from colrow.styles.options import named_placements_of, option, placements_of
from colrow.styles.rank_tensors import rank_heads
from colrow.styles.shards import ShardedParameters, ShardSpec, shard_parameters, shards_of, specs_of
from colrow.styles.site import Site


@dataclass(frozen=True, kw_only=True)
class LocalShards(ShardedParameters):
    """Any module whose own parameters are sharded as `shards` says: name to dim, or to {dim, segments, replicated}. Its
    forward runs on the shards. For stacked experts: `{gate_up_proj: {dim: 1, segments: [F, F]}, down_proj: 2}`.

    A buffer that is named stays on every rank, and forward sees its rows of it: `{running_mean: 0}` of a batch norm.
    A parameter left out is replicated with its gradient summed; one that is added to a partial sum is
    `{scaled: true}`. `output` (default `partial`: left to the enclosing block) says what the output becomes when the
    module ends in a sum over ranks. `input` is the layout of the first argument outside, of a module that no block
    around it hands a local tensor: a convolution whose output channels are sharded. `used_inside` is that of style
    packed_rowwise. `gather`: the output is a shard of this dim, and is gathered ([Note: gathered outputs]).
    """

    name = "local_shards"
    gathers_own_input = True
    sums_gradients = True
    local = True
    layout_reason = "split over tp; the module runs on its shard"
    shards: dict[str, Any] | None = option(shards_of)
    input: Placement | None = option(parse_placement)
    output: Placement | None = option(parse_placement)
    used_inside: bool = False
    gather: int | None = None

    def specs(self, site: Site) -> dict[str, ShardSpec]:
        return specs_of(site, self.name, self.shards or {})

    def build(self, site: Site) -> ParallelStyle:
        partial, inside = self.output is not None, self.used_inside
        return ShardedModuleStyle(
            self.specs(site), self.input, self.output, partial=partial, used_inside=inside, gather=self.gather
        )


class BlockShards(ShardedParameters):
    """What styles of blocks do with two of their options. `shards`, of the block's own parameters, is that of style
    local_shards. `slices` takes this rank's heads of a constant argument: `{alibi: {dim: 0, inner: 32}}` views dim 0 as
    [-1, 32] and keeps this rank's shard of the 32."""

    sums_gradients = True
    local = True
    gathers_for_children = True
    layout_reason = "used on this rank's shard"
    slices: dict[str, Any] | None
    shards: dict[str, Any] | None

    def specs(self, site: Site) -> dict[str, ShardSpec]:
        return specs_of(site, self.name, self.shards or {})

    def check(self, site: Site) -> None:
        super().check(site)
        for name, heads in (self.slices or {}).items():
            site.divide(int(heads["inner"]), "CR201", f"{heads['inner']} parts of argument {name}")


@dataclass(frozen=True, kw_only=True)
class LocalBlock(BlockShards):
    """A block (attention, MLP, mixture of experts) that runs on local tensors between one gather and one reduction.

    `input` and `input_kwargs` give the outside layout of the activations that the block uses in its own way on each
    rank: they are gathered where sharded, and their gradients summed over ranks, once. `none` leaves an argument as it
    is. A tensor inside of a tuple, a list or a dict is named by its path in `input_kwargs`: `rotary.0`. `output` gives
    what each output that is a sum over ranks becomes; `none` for an output that is summed already.
    For `slices` and `shards` see `BlockShards`.

    Inside, parameters that are replicated need the style `grad_sum`.
    """

    name = "local_block"
    input: tuple[Placement | None, ...] | None = option(placements_of)
    input_kwargs: dict[str, Placement | None] | None = option(named_placements_of)
    output: tuple[Placement | None, ...] | None = option(placements_of)
    slices: dict[str, Any] | None = None
    shards: dict[str, Any] | None = option(shards_of)

    def build(self, site: Site) -> ParallelStyle:
        return _LocalBlockHooks(self, self.specs(site))


class _LocalBlockHooks(ParallelStyle):
    def __init__(self, style: LocalBlock, specs: dict[str, ShardSpec]) -> None:
        self.style, self.specs = style, specs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style, mesh = self.style, device_mesh
        shard_parameters(module, mesh, self.specs, self.src_data_rank)
        view_buffers(module, mesh, self.specs)
        mark_grads_summed_at_entry(module)
        layouts = {str(i): layout for i, layout in enumerate(style.input or ())} | (style.input_kwargs or {})
        inputs = _BlockInputs(mesh, layouts, style.slices or {})
        outputs = style.output or ()

        def after(_: nn.Module, args: Any, out: Any) -> Any:
            if isinstance(out, Tensor):
                return out if outputs[0] is None else sum_over_ranks(out, mesh, outputs[0])
            # outputs beyond those that the plan names are left as they are
            reduced = [o if to is None else sum_over_ranks(o, mesh, to) for o, to in zip(out, outputs, strict=False)]
            return type(out)([*reduced, *out[len(reduced) :]])

        module.register_forward_pre_hook(inputs.pre_hook, with_kwargs=True)
        if any(layout is not None for layout in outputs):
            module.register_forward_hook(after)
        return module


class _BlockInputs:
    """The arguments of a block's forward, as its code uses them: local tensors, this rank's heads of a constant.

    Args:
        layouts: by an argument's position or name, or by its path in a tuple, a list or a dict (`rotary.0`).
        slices: arguments of `rank_heads`, in the same way.
    """

    def __init__(
        self, mesh: DeviceMesh, layouts: dict[str, Placement | None], slices: dict[str, dict[str, int]]
    ) -> None:
        self.mesh, self.layouts, self.slices = mesh, layouts, slices
        keys = [*layouts, *slices]
        # each beginning of a path: of `rotary.0.cos` these are `rotary` and `rotary.0`
        self._nested = {key[:i] for key in keys for i, letter in enumerate(key) if letter == "."}

    def pre_hook(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        gathered: list[tuple[Any, Placement, Any]] = []
        placed = tuple(self._placed(str(i), arg, gathered) for i, arg in enumerate(args))
        return placed, {key: self._placed(key, value, gathered) for key, value in kwargs.items()}

    def _placed(self, key: str, value: Any, gathered: list[tuple[Any, Placement, Any]]) -> Any:
        if key in self._nested and type(value) in (tuple, list):
            return type(value)(self._placed(f"{key}.{i}", item, gathered) for i, item in enumerate(value))
        if key in self._nested and type(value) is dict:
            return {name: self._placed(f"{key}.{name}", item, gathered) for name, item in value.items()}
        if (layout := self.layouts.get(key)) is not None:
            value = self._gathered_once(value, layout, gathered)
        heads = self.slices.get(key)
        return value if heads is None or not isinstance(value, Tensor) else rank_heads(value, self.mesh, **heads)

    def _gathered_once(self, value: Any, layout: Placement, gathered: list[tuple[Any, Placement, Any]]) -> Any:
        """One tensor that is query, key and value has one gather, and so one sum of its gradient."""
        # no dict by id(): a graph of torch 2.11 has no id() of tensors
        done = [local for given, to, local in gathered if given is value and to == layout]
        local = done[0] if done else local_input(value, self.mesh, layout, gather=True)
        gathered.append((value, layout, local))
        return local
