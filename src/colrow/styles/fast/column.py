"""The fast styles of column-parallel linears: `fast_gather` with `fast_colwise` and `fast_kv_replicate`; `fast_column`.

`fast_gather` stands on the module whose projections share an input (`self_attn`, `mlp`). It gathers that input once and
multiplies it by all their weights; each projection, style `fast_colwise`, then takes its own output out of what it is
called with. `fast_column` is for a projection without siblings: it gathers its own input.

Legend: B sequences, T tokens, t = T/n this rank's tokens, D hidden size, N = B T, F this rank's output features of all
siblings together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.errors import PlanError
from colrow.ops.parallel_linear import column_linear
from colrow.styles.fast.linear import (
    FORWARD_STATE,
    HISTORY,
    QUANTIZED,
    FastLinear,
    FastLinearStyle,
    LinearState,
    argument_at,
    is_linear,
    multiplies,
    require_linear,
    weight_out_in,
    with_argument,
)
from colrow.styles.fast.unflatten import unflatten_tokens
from colrow.styles.linear import Colwise
from colrow.styles.local_module import mark_grads_summed_at_entry
from colrow.styles.options import names_of, option
from colrow.styles.packed import ColumnSegments
from colrow.styles.replicated import KvReplicate
from colrow.styles.site import Site


def leaf_name(fqn: str) -> str:
    """`q_proj` of `layers.0.self_attn.q_proj`."""
    return fqn.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class FastGather(FastLinear):
    """One all-gather and one matmul for the modules inside that `columns` names, which have style fast_colwise or
    fast_kv_replicate. `argument` is the gathered one's number or name: the first unless given, or `hidden_states`.
    `keep_gathered: false` gathers the input again in backward instead of keeping it. For the other options see
    `FastLinear`."""

    name = "fast_gather"
    on_data_axes = True  # one matmul for all columns
    gathers_for_children = True
    operator = "column_forward"
    columns: tuple[str, ...] = option(names_of, ())
    argument: int | str | None = None
    keep_gathered: bool = True

    def check(self, site: Site) -> None:
        check_columns(site, self.name, self.columns, site.module)

    def build(self, site: Site) -> ParallelStyle:
        return _GatherHook(self, site.fqn)


def check_columns(site: Site, style: str, columns: tuple[str, ...], around: nn.Module) -> None:
    """Raise PlanError where `columns` are not linears inside the module `around`, each with a name of its own."""
    inside = dict(around.named_modules())
    for column in columns:
        if column not in inside or not is_linear(inside[column]):
            raise site.wrong_options(f"{style} names {column!r}, which is no linear child of it", "correct it")
    if not columns:
        raise site.wrong_options(
            f"style {style} needs the option columns", "name its projections, such as [gate_proj, up_proj]"
        )
    if len({leaf_name(column) for column in columns}) < len(columns):
        raise site.wrong_options(f"{style} names two columns that are called alike", "give these the style fast_column")


@dataclass(frozen=True)
class SiblingGather:
    """All-gathers the input of sibling column linears once, and multiplies by all their weights at once."""

    fqn: str
    columns: tuple[str, ...]
    argument: int | str | None
    state: LinearState

    def pre_hook(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The arguments of the module around the siblings, with their outputs in place of the input."""
        key = self.argument
        if key is None:  # transformers' layers call self_attn with keyword arguments only
            key = 0 if args else "hidden_states"
        x_BtD = argument_at(args, kwargs, key)
        if not isinstance(x_BtD, Tensor):
            message = f"fast_gather finds no tensor as argument {key!r}"
            raise PlanError("CR211", self.fqn, message, "set the option argument to its number or name")
        columns = [module.get_submodule(name) for name in self.columns]
        return with_argument(args, kwargs, key, self.outputs(module, columns, x_BtD))

    def outputs(self, module: nn.Module, columns: Sequence[nn.Module], x_BtD: Tensor) -> SiblingOutputs:
        """This rank's tokens [B, t, D] -> of each column this rank's output features [B, T, f], without biases."""
        weights = [weight_out_in(column) for column in columns]
        y_BTF = gathered_linear(module, x_BtD, weights, self.state)
        shards = y_BTF.split([w.shape[0] for w in weights], -1)
        outputs = dict(zip(map(leaf_name, self.columns), shards, strict=True))
        # self and not self.fqn: torch.compile guards on what forward reads, and would compile each layer again
        return SiblingOutputs(self, outputs, (*y_BTF.shape[:-1], x_BtD.shape[-1]), x_BtD)


class _GatherHook(ParallelStyle):
    def __init__(self, style: FastGather, fqn: str) -> None:
        self.style, self.fqn = style, fqn

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        state = self.style.linear_state(device_mesh)
        # Inside, activations are local. The gather's backward is a reduce-scatter, so gradients are summed there, once.
        mark_grads_summed_at_entry(module)
        gather = SiblingGather(self.fqn, self.style.columns, self.style.argument, state)
        multiplies(module, [module.get_submodule(name) for name in self.style.columns], state)
        module.register_forward_pre_hook(gather.pre_hook, with_kwargs=True)
        return module


class InputNotGatheredError(PlanError, AttributeError):
    """A module under fast_gather computes with its input itself. An AttributeError too, so that `hasattr` works."""


class SiblingOutputs:
    """What a fast_gather passes to its module in place of the input: the projections' outputs.

    It has the gathered input's shape, dtype and device, and the conversions that change nothing. Other uses of the
    input, which is not gathered, raise InputNotGatheredError.
    """

    def __init__(self, gather: SiblingGather, outputs: dict[str, Tensor], shape: tuple[int, ...], x: Tensor) -> None:
        self.gather, self.outputs, self.shape = gather, outputs, torch.Size(shape)
        self.dtype, self.device, self.ndim = x.dtype, x.device, len(shape)

    def to(self, *args: Any, **kwargs: Any) -> SiblingOutputs:
        # torch reads the arguments, which come in many forms
        converted = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if (converted.dtype, converted.device) != (self.dtype, self.device):
            raise self._error(f"converts it to {converted.dtype} on {converted.device}")
        return self

    def contiguous(self) -> SiblingOutputs:
        return self

    def __getattr__(self, name: str) -> Any:
        raise self._error(f"uses its {name}")

    def _error(self, use: str) -> InputNotGatheredError:
        message = f"fast_gather has replaced the input by the projections' outputs, and the module's code {use}"
        fix = "do so before the module, or use prepare_input and colwise in place of fast_gather and fast_colwise"
        # by __dict__: copy asks an object for attributes before it has any, and self.gather would come back here
        return InputNotGatheredError("CR211", getattr(self.__dict__.get("gather"), "fqn", ""), message, fix)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim


def gathered_linear(module: nn.Module, x_BtD: Tensor, weights: list[Tensor], state: LinearState) -> Tensor:
    """[B, t, D] on each rank -> [B, T, F]: the all-gather and the matmuls with all weights, without biases. `module`:
    the one that multiplies."""
    quantized, history = getattr(module, QUANTIZED), getattr(module, HISTORY)
    y_NF = column_linear(x_BtD.flatten(0, -2), weights, state.group, state.options, quantized, history)
    return unflatten_tokens(y_NF, x_BtD)


@dataclass(frozen=True)
class SiblingState:
    """What the forward of a fast_colwise needs: its name among the outputs."""

    name: str


def _sibling_forward(module: Any, x: Any) -> Tensor:
    """The forward of a fast_colwise: its output from what the parent has computed, and the bias."""
    name = getattr(module, FORWARD_STATE).name
    if not isinstance(x, SiblingOutputs) or name not in x.outputs:
        message = f"{name} has a fast column style and was called with {type(x).__name__}"
        raise PlanError("CR211", "", message, f"its parent needs style fast_gather with {name} in its option columns")
    y = x.outputs[name]
    bias = module.bias  # not in the product of all siblings, of which some may have none
    return y if bias is None else y + bias


@dataclass(frozen=True, kw_only=True)
class FastColumns(ColumnSegments):
    """What fast column styles have in common; for the options see `packed.ColumnSegments`."""

    layout_reason = "output features split"

    def check(self, site: Site) -> None:
        require_linear(site, self.name)
        # Colwise says more of a size that does not divide, but knows no Conv1D and no segments
        if self.segments is None and isinstance(site.module, nn.Linear):
            Colwise().check(site)
        super().check(site)


@dataclass(frozen=True, kw_only=True)
class FastColwise(FastColumns):
    """A linear whose output features are sharded, computed by the fast_gather of a module around it. For the options
    see `packed.ColumnSegments`."""

    name = "fast_colwise"
    on_data_axes = True

    def build(self, site: Site) -> ParallelStyle:
        state = SiblingState(leaf_name(site.fqn))
        return FastLinearStyle(self.specs(site), _sibling_forward, lambda _: state)


@dataclass(frozen=True, kw_only=True)
class FastKvReplicate(KvReplicate):
    """`kv_replicate` for a projection that the fast_gather of a module around it computes."""

    name = "fast_kv_replicate"
    gathers_own_input = False
    on_data_axes = True

    def build(self, site: Site) -> ParallelStyle:
        heads = self.resolve(site)
        if heads.kv % site.tp == 0:
            return FastColwise().build(site)
        # of the rows that all ranks hold each uses those of the kv heads that its query heads need
        column = FastColwise(segments=(heads.kv * heads.dim,), kv=(0,), heads=heads.query, kv_heads=heads.kv)
        return column.build(site)


@dataclass(frozen=True, kw_only=True)
class FastColumn(FastLinear, FastColumns):
    """A linear whose output features are sharded and which gathers its own input: one that has no sibling. For the
    options see `packed.ColumnSegments`, `FastLinear` and `FastGather`."""

    name = "fast_column"
    gathers_own_input = True
    keep_gathered: bool = True

    def build(self, site: Site) -> ParallelStyle:
        return FastLinearStyle(self.specs(site), _column_forward, self.linear_state)


def _column_forward(module: Any, x_BtD: Tensor) -> Tensor:
    """The forward of a fast_column: this rank's tokens [B, t, D] -> [B, T, F]."""
    state: LinearState = getattr(module, FORWARD_STATE)
    y_BTF = gathered_linear(module, x_BtD, [weight_out_in(module)], state)
    bias = module.bias
    return y_BTF if bias is None else y_BTF + bias
