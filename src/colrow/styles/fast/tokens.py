"""The fast styles at the borders of the part of a model that works on shards of the tokens: `fast_shard_tokens` and
`fast_gather_tokens`. See [Note: flattened tokens] in `fast.linear`.
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
from colrow.ops.tokens import all_tokens, local_tokens
from colrow.styles.base import ParameterLayout, replicated
from colrow.styles.fast.linear import FlattenedTokens, argument_at, group_name, with_argument
from colrow.styles.fast.unflatten import unflatten_tokens
from colrow.styles.options import integers_of, option
from colrow.styles.rank_tensors import rank_table
from colrow.styles.shards import ShardSpec, shard_parameters
from colrow.styles.site import Site

Keys = tuple[int | str, ...]
"""Arguments by number or by name."""


def keys_of(value: Any) -> Keys:
    """The option of several arguments; a single one stands for itself."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def over_tokens(change: Callable[[Tensor, str], Tensor], x: Tensor, group: str) -> Tensor:
    """[T, D] or [B, T, ...], flattened to tokens, changed, and viewed as before with as many more or fewer tokens."""
    y = change(x if x.dim() == 2 else x.flatten(0, 1), group)
    return unflatten_tokens(y, x)


def outputs_over_tokens(change: Callable[[Tensor, str], Tensor], out: Any, numbers: Keys, group: str) -> Any:
    """A module's output with `change` applied to the tokens of the outputs of these numbers, or of the only one."""
    if isinstance(out, Tensor):
        return over_tokens(change, out, group)
    return type(out)(over_tokens(change, o, group) if i in numbers else o for i, o in enumerate(out))


def tensor_argument(fqn: str, style: str, args: Any, kwargs: Any, key: int | str) -> Tensor:
    """The argument of this number or name. Raises PlanError where there is no tensor."""
    x = argument_at(args, kwargs, key)
    if not isinstance(x, Tensor):
        raise PlanError("CR211", fqn, f"style {style} finds no tensor as argument {key!r}", "correct the plan")
    return x


@dataclass(frozen=True, kw_only=True)
class _TokenArguments(FlattenedTokens):
    """`arguments` names them by number or by name; the first one unless given."""

    arguments: Keys = option(keys_of, (0,))

    def kept_outputs(self) -> tuple[int, ...]:
        """Numbers of the module's outputs of which each rank keeps its own tokens."""
        return ()

    @abstractmethod
    def change(self, x: Tensor, rank: Tensor, group: str) -> Tensor:
        """The tokens [T, D] or [t, D], changed; `rank` holds this rank's number in the group."""

    def build(self, site: Site) -> ParallelStyle:
        return _TokenHook(self, site.fqn)


class _TokenHook(ParallelStyle):
    def __init__(self, style: _TokenArguments, fqn: str, specs: dict[str, ShardSpec] | None = None) -> None:
        self.style, self.fqn, self.specs = style, fqn, specs or {}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        shard_parameters(module, device_mesh, self.specs, self.src_data_rank)
        style, group, fqn = self.style, group_name(device_mesh), self.fqn
        outputs = style.kept_outputs()
        rank = rank_table(device_mesh, [[number] for number in range(device_mesh.size())])

        def change(x: Tensor, group: str) -> Tensor:
            return style.change(x, rank, group)

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            for key in style.arguments:
                x = tensor_argument(fqn, style.name, args, kwargs, key)
                args, kwargs = with_argument(args, kwargs, key, over_tokens(change, x, group))
            return args, kwargs

        def own(x: Tensor, group: str) -> Tensor:
            return local_tokens(x, rank, group)

        module.register_forward_pre_hook(before, with_kwargs=True)
        if outputs:
            module.register_forward_hook(lambda _, __, out: outputs_over_tokens(own, out, outputs, group))
        return module


@dataclass(frozen=True, kw_only=True)
class FastShardTokens(_TokenArguments):
    """Arguments that are the same on every rank become this rank's shard of the flattened tokens."""

    name = "fast_shard_tokens"
    previous_names = ("fast_part",)

    def change(self, x: Tensor, rank: Tensor, group: str) -> Tensor:
        return local_tokens(x, rank, group)


@dataclass(frozen=True, kw_only=True)
class FastShardTokensGradSum(FastShardTokens):
    """`fast_shard_tokens` for a module that uses parameters of its own on this rank's tokens: they are replicated, and
    their gradients summed over tp."""

    name = "fast_shard_tokens_grad_sum"
    sums_gradients = True

    def build(self, site: Site) -> ParallelStyle:
        names = [name for name, _ in site.module.named_parameters(recurse=False)]
        return _TokenHook(self, site.fqn, dict.fromkeys(names, ShardSpec()))

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return replicated(site.module, "used on this rank's tokens; gradients summed over tp")


@dataclass(frozen=True, kw_only=True)
class FastGatherTokens(_TokenArguments):
    """Arguments that are this rank's tokens are gathered, for a module that every rank runs alike. `outputs` are the
    numbers of those of its outputs of which each rank keeps its own tokens: a module in the midst of the stream."""

    name = "fast_gather_tokens"
    previous_names = ("fast_whole",)
    outputs: tuple[int, ...] | None = option(integers_of)

    def kept_outputs(self) -> tuple[int, ...]:
        return self.outputs or ()

    def change(self, x: Tensor, rank: Tensor, group: str) -> Tensor:
        return all_tokens(x, rank, group)
