"""What the fast styles of linears have in common: their options, and how a linear's forward is replaced.

The fast styles run on local tensors with explicit collectives (`ops.parallel_linear`), on flattened tokens. That no
weight is multiplied by the wrong input is seen at run time: a fast forward that is called with anything but what its
gather hands over raises, so the fast path ran, or there is an error.

[Note: flattened tokens]
Between blocks each rank holds tokens r t .. (r+1) t of all B T tokens of the micro-batch, whatever sequence they are
of, viewed as [B, T/n, D]. An all-gather of dimension 0 then gives the tokens in their order, and no copy is needed
before or after it; shards of dimension 1 would come out in the order of the ranks. Norms, residuals and linears work
on each token alone, so the order does not matter to them. That holds only where all styles agree: a plan that mixes
these styles with ones that shard dimension 1 is refused (`Style.token_order`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.errors import PlanError, did_you_mean
from colrow.ops.carriers import Overlap, carrier
from colrow.ops.float8 import RECIPES
from colrow.ops.linear_options import CHUNK_ROWS, LinearOptions, option_names
from colrow.sharding.local_view import replace_forward
from colrow.styles.base import Style, TokenOrder
from colrow.styles.options import option
from colrow.styles.packed import is_transposed
from colrow.styles.shards import ShardSpec, shard_parameters
from colrow.styles.site import Site

FORWARD_STATE = "_colrow_forward_state"
"""Module attribute: the frozen dataclass that the module's fast forward reads."""

QUANTIZED = "_colrow_quantized"
"""Module attribute of what multiplies in 8 bits: its weights in 8 bits, while somebody keeps them so, else nothing; see
[Note: quantized weights] in `ops.parallel_linear`."""
HISTORY = "_colrow_peak_history"
"""Beside QUANTIZED: its [Note: peak history] in `ops.float8`; None until `peak_history.PeakHistory` makes it."""
MULTIPLIES = "_colrow_multiplies"
"""Beside QUANTIZED: the module's `Multiplied`."""


@dataclass(frozen=True)
class LinearState:
    """What the forward of a fast linear needs."""

    group: str
    ranks: int
    options: LinearOptions


@dataclass(frozen=True)
class Multiplied:
    """The linears whose weights a module multiplies by, side by side, and how."""

    linears: tuple[nn.Module, ...]
    options: LinearOptions


class FastLinearStyle(ParallelStyle):
    """Shards a linear's parameters, and lets `forward`, a function of module level, take the place of its own.

    Args:
        state: what `forward` reads under FORWARD_STATE.
    """

    def __init__(
        self, specs: dict[str, ShardSpec], forward: Callable[..., Any], state: Callable[[DeviceMesh], Any]
    ) -> None:
        self.specs, self.forward, self.state = specs, forward, state

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.size() > 1:  # on one rank parameters stay plain tensors
            shard_parameters(module, device_mesh, self.specs, self.src_data_rank)
        # past nn.Module.__setattr__: it is neither a parameter nor a submodule
        module.__dict__[FORWARD_STATE] = state = self.state(device_mesh)
        if isinstance(state, LinearState):
            multiplies(module, [module], state)
        replace_forward(module, self.forward)
        return module


def multiplies(module: nn.Module, linears: Sequence[nn.Module], state: LinearState) -> None:
    """Note that `module` multiplies by the weights of `linears`."""
    module.__dict__ |= {QUANTIZED: (), HISTORY: None, MULTIPLIES: Multiplied(tuple(linears), state.options)}


def multiplied(model: nn.Module) -> dict[nn.Module, Multiplied]:
    """The modules that multiply in fast styles."""
    found = {module: module.__dict__.get(MULTIPLIES) for module in model.modules()}
    return {module: each for module, each in found.items() if each is not None}


def is_linear(module: nn.Module) -> bool:
    """Whether the module's forward is a matmul with its weight and the addition of its bias: a Linear, or
    transformers' Conv1D. A subclass with a forward of its own may do more, which a fast style would leave out."""
    module_cls = type(module)
    if isinstance(module, nn.Linear):
        return module_cls.forward is nn.Linear.forward
    return module_cls.__name__ == "Conv1D" and module_cls.__module__ == "transformers.pytorch_utils"


def require_linear(site: Site, style: str) -> None:
    """Raise a PlanError for a module that is not `is_linear`."""
    if not is_linear(site.module):
        own = ", which has a forward of its own" if isinstance(site.module, nn.Linear) else ""
        raise site.wrong_class(f"style {style} is for nn.Linear, not for {type(site.module).__name__}{own}")


def weight_out_in(module: Any) -> Tensor:
    """The local weight as [out, in]."""
    weight: Tensor = module.weight
    return weight.t() if is_transposed(module) else weight


def group_name(mesh: DeviceMesh) -> str:
    """Of a 1-D mesh's process group: operators take numbers, texts and tensors, and find the group by its name."""
    return str(mesh.get_group().group_name)


def create_carrier(mesh: DeviceMesh, overlap: str) -> None:
    """Create the carrier of chunks now, so that an unsupported setup fails before the first step."""
    if dist.get_backend(mesh.get_group()) != "fake":  # a dry run sends nothing
        on_gpu = mesh.device_type == "cuda"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device(mesh.device_type)
        carrier(overlap, group_name(mesh), device)


def _float8_of(recipe: str) -> str:
    if recipe and recipe not in RECIPES:
        message = f"unknown fp8 {recipe!r}{did_you_mean(recipe, RECIPES)}"
        raise PlanError("CR211", "", message, "")
    return recipe


class FlattenedTokens(Style):
    """A style whose module works on this rank's shard of the flattened tokens, or on all of them in their order."""

    @property
    def token_order(self) -> TokenOrder:
        return "flattened"


@dataclass(frozen=True, kw_only=True)
class FastLinear(FlattenedTokens):
    """The options of styles that multiply.

    `overlap` says what runs beside matmuls: `none`, `collectives` (NCCL's, where a matmul does not need them), or
    chunks that are sent while others are multiplied, by NCCL (`point_to_point`) or the GPUs' `copy_engine`; chunks of
    fewer than `chunk_rows` rows are not sent apart. `fp8: tensorwise` multiplies 8-bit floats, with a scale for
    each tensor; `delayed` too, with scales of activations and gradients by the last step's numbers; `rowwise` with one
    for each row, `blockwise` with one for each 128 numbers of a token and 128 x 128 of a weight, and weights' gradients
    as they are.
    """

    computes_module = True
    overlap: Overlap = "collectives"
    chunk_rows: int = CHUNK_ROWS
    fp8: str = option(_float8_of, "")

    def applies(self, tp: int, *, data_axes: bool) -> bool:
        return super().applies(tp, data_axes=data_axes) or (data_axes and bool(self.fp8))

    def linear_state(self, mesh: DeviceMesh) -> LinearState:
        """The forward's state; creates the carrier."""
        # a style offers those options of a linear that it can use: of a row-parallel one nothing is gathered and kept
        options = {name: getattr(self, name) for name in option_names() if hasattr(self, name)}
        if mesh.size() == 1:
            options |= {"overlap": "none", "keep_gathered": False}  # nothing is gathered that could be kept
        else:
            create_carrier(mesh, self.overlap)
        return LinearState(group_name(mesh), mesh.size(), LinearOptions(**options))


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
