"""Fast styles of modules that are no products: where tokens in a row become whole, and parts again (see `styles_fast`).

`fast_block` is what `local_block` is among the plain styles, for modules whose input goes not only into columns.
`fast_part` and `fast_whole` stand where the part of a model that works on parts of the tokens begins and ends.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.errors import PlanError
from colrow.ops.parallel_linear import gather, scatter_sum
from colrow.ops.tokens import part_of, whole_of
from colrow.styles.base import ParameterLayout, Style
from colrow.styles.block import part_of_heads
from colrow.styles.cuts import IN_BLOCK, check_cuts, layouts, named_cuts, place
from colrow.styles.fast.common import argument_at, group_name, with_argument
from colrow.styles.local import rank_table
from colrow.styles.site import Site, divide

Keys = tuple[int | str, ...]


def _keys(value: Any) -> Keys:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _over_rows(change: Callable[[Tensor, str], Tensor], x: Tensor, group: str) -> Tensor:
    """[..., T, D] with its tokens in a row, changed, with as many more or less of them."""
    y = change(x.flatten(0, -2), group)
    return y.view(*x.shape[:-2], x.shape[-2] * y.shape[0] // x[..., 0].numel(), x.shape[-1])


@dataclass(frozen=True, kw_only=True)
class FastBlock(Style):
    """A module that runs on local tensors and all tokens. `gather` names the arguments (numbers or names) that come as
    this rank's tokens and that each rank uses in its own way; `scatter` the outputs (numbers) that are a part of a sum
    over ranks, which become this rank's tokens of the sum. `slices` and `shards` are those of style local_block.
    """

    name = "fast_block"
    token_order = "row"
    gather: Keys = ()
    scatter: tuple[int, ...] = ()
    slices: dict[str, Any] | None = None
    shards: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "gather", _keys(self.gather))
        object.__setattr__(self, "scatter", _keys(self.scatter))

    def check(self, site: Site) -> None:
        check_cuts(site, named_cuts(site, self.name, self.shards or {}))
        for name, said in (self.slices or {}).items():
            divide(int(said["inner"]), site.tp, f"{site.fqn}: {said['inner']} parts of argument {name}")

    def build(self, site: Site) -> ParallelStyle:
        return _BlockHooks(self, site)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return layouts(site, named_cuts(site, self.name, self.shards or {}), "used on this rank's part")


class _BlockHooks(ParallelStyle):
    def __init__(self, style: FastBlock, site: Site) -> None:
        self.style, self.fqn = style, site.fqn
        self.cuts = named_cuts(site, style.name, style.shards or {})

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style, mesh, group, fqn = self.style, device_mesh, group_name(device_mesh), self.fqn
        place(module, mesh, self.cuts)
        for inner in module.modules():
            setattr(inner, IN_BLOCK, True)

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            for key in style.gather:
                x = _tensor(fqn, style.name, args, kwargs, key)
                args, kwargs = with_argument(args, kwargs, key, _over_rows(gather, x, group))
            for name, said in (style.slices or {}).items():
                key = int(name) if name.isdigit() else name
                value = argument_at(args, kwargs, key)
                if isinstance(value, Tensor):
                    args, kwargs = with_argument(args, kwargs, key, part_of_heads(value, mesh, **said))
            return args, kwargs

        def after(_: nn.Module, __: Any, out: Any) -> Any:
            if isinstance(out, Tensor):
                return _over_rows(scatter_sum, out, group)
            return type(out)(_over_rows(scatter_sum, o, group) if i in style.scatter else o for i, o in enumerate(out))

        module.register_forward_pre_hook(before, with_kwargs=True)
        if style.scatter:
            module.register_forward_hook(after)
        return module


def _tensor(fqn: str, style: str, args: Any, kwargs: Any, key: int | str) -> Tensor:
    x = argument_at(args, kwargs, key)
    if not isinstance(x, Tensor):
        raise PlanError(f"{fqn}: style {style} finds no tensor as argument {key!r}: correct the plan")
    return x


@dataclass(frozen=True, kw_only=True)
class _Arguments(Style):
    """`arguments` names them by number or by name; the first one unless given."""

    arguments: Keys = (0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", _keys(self.arguments))

    @abstractmethod
    def change(self, x: Tensor, rank: Tensor, group: str) -> Tensor:
        """The tokens [T, D] or [t, D], changed; `rank` holds this rank's number in the group."""

    def build(self, site: Site) -> ParallelStyle:
        return _ArgumentHook(self, site.fqn)


class _ArgumentHook(ParallelStyle):
    def __init__(self, style: _Arguments, fqn: str) -> None:
        self.style, self.fqn = style, fqn

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style, group, fqn = self.style, group_name(device_mesh), self.fqn
        rank = rank_table(device_mesh, [[number] for number in range(device_mesh.size())])

        def change(x: Tensor, group: str) -> Tensor:
            return style.change(x, rank, group)

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            for key in style.arguments:
                x = _tensor(fqn, style.name, args, kwargs, key)
                args, kwargs = with_argument(args, kwargs, key, _over_rows(change, x, group))
            return args, kwargs

        module.register_forward_pre_hook(before, with_kwargs=True)
        return module


@dataclass(frozen=True, kw_only=True)
class FastPart(_Arguments):
    """Arguments that are whole and the same on every rank become this rank's part of the tokens in a row."""

    name = "fast_part"
    token_order = "row"

    def change(self, x: Tensor, rank: Tensor, group: str) -> Tensor:
        return part_of(x, rank, group)


@dataclass(frozen=True, kw_only=True)
class FastWhole(_Arguments):
    """Arguments that are this rank's tokens become whole, for a module that every rank runs alike."""

    name = "fast_whole"
    token_order = "row"

    def change(self, x: Tensor, rank: Tensor, group: str) -> Tensor:
        return whole_of(x, rank, group)
