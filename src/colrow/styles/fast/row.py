"""The fast style of a row-parallel linear: `fast_rowwise`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.ops.parallel_linear import row_linear
from colrow.styles.fast.linear import (
    FORWARD_STATE,
    HISTORY,
    QUANTIZED,
    FastLinear,
    FastLinearStyle,
    LinearState,
    require_linear,
    weight_out_in,
)
from colrow.styles.fast.unflatten import unflatten_tokens
from colrow.styles.linear import Rowwise
from colrow.styles.options import integers_of, option
from colrow.styles.packed import row_specs
from colrow.styles.shards import ShardedParameters, ShardSpec
from colrow.styles.site import Site


@dataclass(frozen=True, kw_only=True)
class FastRowwise(FastLinear, ShardedParameters):
    """A linear whose input features are sharded, as one or as `segments` one after another; its output is this rank's
    shard of the flattened tokens. For the other options see `FastLinear`."""

    name = "fast_rowwise"
    sums_gradients = True
    operator = "row_forward"
    saved_operators = frozenset({"colrow::row_forward"})  # a matmul and its reduce-scatter in one
    layout_reason = "input features split"
    segments: tuple[int, ...] | None = option(integers_of)

    def specs(self, site: Site) -> dict[str, ShardSpec]:
        # The bias is added after the sum, by each rank to its own tokens: replicated, with its gradient summed.
        return row_specs(site, self.name, self.segments, bias=ShardSpec())

    def check(self, site: Site) -> None:
        require_linear(site, self.name)
        # Rowwise says more of a size that does not divide, but knows no Conv1D and no segments
        if self.segments is None and isinstance(site.module, nn.Linear):
            Rowwise().check(site)
        super().check(site)

    def build(self, site: Site) -> ParallelStyle:
        return FastLinearStyle(self.specs(site), _row_forward, self.linear_state)


def _row_forward(module: Any, x_BTf: Tensor) -> Tensor:
    """The forward of a fast_rowwise: all tokens, this rank's features [B, T, f] -> this rank's tokens [B, t, D]."""
    state: LinearState = getattr(module, FORWARD_STATE)
    x_Nf, weight = x_BTf.flatten(0, -2), weight_out_in(module)
    quantized, history = getattr(module, QUANTIZED), getattr(module, HISTORY)
    y_tD = row_linear(x_Nf, weight, state.group, state.options, quantized, history)
    y_BtD = unflatten_tokens(y_tD, x_BTf)
    bias = module.bias  # after the sum over ranks, so it counts once
    return y_BtD if bias is None else y_BtD + bias
