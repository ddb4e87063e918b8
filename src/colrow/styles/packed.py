"""Styles for fused weights: `packed_colwise` and `packed_rowwise` shard each segment on its own ([Note: segments])."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from colrow.sharding.placements import parse_placement
from colrow.styles.base import OutputSegment
from colrow.styles.local_module import ShardedModuleStyle
from colrow.styles.options import integers_of, option
from colrow.styles.shards import ShardedParameters, ShardSpec
from colrow.styles.site import Site


def is_transposed(module: nn.Module) -> bool:
    """Whether weights are [in, out]: transformers' Conv1D, and stacked experts that say so."""
    if isinstance(module, nn.Linear):
        return False
    return hasattr(module, "nf") or bool(getattr(module, "is_transposed", False))


def _out_and_in_dims(site: Site, style: str) -> tuple[int, int]:
    """Dimensions of output and input features of the weight: (0, 1) for a Linear, (1, 0) for transformers' Conv1D."""
    module: Any = site.module
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
        raise site.wrong_class(
            f"style {style} is for a module that multiplies by a two-dimensional weight, not {type(module).__name__}"
        )
    return (1, 0) if is_transposed(module) else (0, 1)


@dataclass(frozen=True, kw_only=True)
class ColumnSegments(ShardedParameters):
    """The options of styles that shard output features: as one, or as `segments` one after another, each sharded over
    tp. Those at the positions `replicated` are computed by every rank (the one k and v head of multi-query attention);
    of those at the positions `kv`, which hold `kv_heads` for `heads` query heads, a rank computes what its query heads
    need. Beside segments that are split, these too are held in shards, and gathered for the forward."""

    computes_module = True
    sums_gradients = True
    segments: tuple[int, ...] | None = option(integers_of)
    replicated: tuple[int, ...] | None = option(integers_of, previous="whole")
    kv: tuple[int, ...] | None = option(integers_of)
    heads: int | None = None
    kv_heads: int | None = None

    def specs(self, site: Site) -> dict[str, ShardSpec]:
        out, _ = _out_and_in_dims(site, self.name)
        parameters = site.module._parameters
        assert parameters["weight"] is not None
        segments = self.segments or (int(parameters["weight"].shape[out]),)
        kv, heads, kv_heads = self.kv or (), self.heads or 0, self.kv_heads or 0
        weight = ShardSpec(out, segments, self.replicated or (), kv=kv, heads=heads, kv_heads=kv_heads)
        return _with_bias(parameters, weight, replace(weight, dim=0))

    def output_segments(self, site: Site) -> tuple[OutputSegment, ...]:
        spec = self.specs(site)["weight"]
        sizes = zip(spec.segments, spec.local_sizes(site.tp), strict=True)
        return tuple(OutputSegment(n, local, i in spec.replicated) for i, (n, local) in enumerate(sizes))


@dataclass(frozen=True, kw_only=True)
class PackedColwise(ColumnSegments):
    """Linear or Conv1D whose output features are `segments` one after another; see `ColumnSegments`.

    `input` is the layout of x outside. Unless given, x comes as the enclosing `local_block` hands it over; without a
    block it is replicated. `used_inside`: x is made of a sum that has this option, too: that sums its gradient.
    """

    name = "packed_colwise"
    gathers_own_input = True
    layout_reason = "output features split, segment by segment"
    input: Placement | None = option(parse_placement)
    used_inside: bool = False

    def build(self, site: Site) -> ParallelStyle:
        # used_inside: x is the output of a module that has summed its gradient already
        outside = None if self.used_inside else Replicate()
        return ShardedModuleStyle(self.specs(site), self.input, None, partial=False, outside=outside)


def row_specs(site: Site, style: str, segments: tuple[int, ...] | None, bias: ShardSpec) -> dict[str, ShardSpec]:
    """The specs of a linear whose input features are sharded; `bias` is that of its bias, where it has one."""
    _, into = _out_and_in_dims(site, style)
    parameters = site.module._parameters
    assert parameters["weight"] is not None
    weight = ShardSpec(into, segments or (int(parameters["weight"].shape[into]),))
    return _with_bias(parameters, weight, bias)


def _with_bias(parameters: Mapping[str, Any], weight: ShardSpec, bias: ShardSpec) -> dict[str, ShardSpec]:
    return {"weight": weight} if parameters.get("bias") is None else {"weight": weight, "bias": bias}


@dataclass(frozen=True, kw_only=True)
class PackedRowwise(ShardedParameters):
    """Linear or Conv1D whose input features are `segments` one after another, each sharded over tp; the output is a sum
    over ranks, brought to `output` (`partial` leaves the sum to the enclosing block). `used_inside`: each rank uses the
    sum with its own shards, as the steps of a state-space model, and gives back a term of its gradient."""

    name = "packed_rowwise"
    computes_module = True
    sums_gradients = True
    layout_reason = "input features split, segment by segment"
    segments: tuple[int, ...] | None = option(integers_of)
    output: Placement | None = option(parse_placement)
    used_inside: bool = False

    def specs(self, site: Site) -> dict[str, ShardSpec]:
        # Each rank adds the bias before the sum over ranks, so each adds 1/tp of it.
        return row_specs(site, self.name, self.segments, bias=ShardSpec(scaled=True))

    def build(self, site: Site) -> ParallelStyle:
        return ShardedModuleStyle(
            self.specs(site), None, self.output or Replicate(), partial=True, used_inside=self.used_inside
        )
