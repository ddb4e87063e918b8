"""torch's own styles of linears and embeddings: `colwise` and `rowwise`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from colrow.sharding.layout import chunk_sizes
from colrow.sharding.placements import parse_placement
from colrow.styles.base import ParameterLayout, Style, replicated
from colrow.styles.heads import check_heads
from colrow.styles.options import option
from colrow.styles.site import Site, split_rows


@dataclass(frozen=True, kw_only=True)
class _TorchLinear(Style):
    computes_module = True
    input: Placement | None = option(parse_placement)
    output: Placement | None = option(parse_placement)
    use_local_output: bool = True

    @classmethod
    def from_torch(cls, style: Any) -> Self:
        return cls(  # torch keeps each layout as a tuple of one
            input=style.input_layouts[0], output=style.output_layouts[0], use_local_output=style.use_local_output
        )

    def layouts(self) -> dict[str, Any]:
        """The options as torch's classes take them."""
        return {
            "input_layouts": self.input,
            "output_layouts": self.output,
            "use_local_output": self.use_local_output,
        }


@dataclass(frozen=True, kw_only=True)
class Colwise(_TorchLinear):
    """Linear: output features sharded, x replicated in, y sharded out. Embedding: the embedding dimension sharded."""

    name = "colwise"
    torch_class = ColwiseParallel
    gathers_own_input = True

    def build(self, site: Site) -> ParallelStyle:
        local = self.output_stays_sharded and self.use_local_output
        cls = _WritableColwise if local or isinstance(site.module, nn.Embedding) else ColwiseParallel
        return cls(**self.layouts())

    @property
    def output_stays_sharded(self) -> bool:
        # None: torch's default, which is Shard(-1)
        return self.output is None or (isinstance(self.output, Shard) and self.output.dim == -1)

    def check(self, site: Site) -> None:
        module = site.require(self.name, nn.Linear, nn.Embedding)
        if isinstance(module, nn.Embedding):
            site.divide(module.embedding_dim, "CR201", f"embedding_dim={module.embedding_dim}")
            return
        if self.output_stays_sharded:
            check_heads(site)
        if self.output_stays_sharded and self.use_local_output:
            site.divide(module.out_features, "CR201", f"out_features={module.out_features}")
        else:  # the output is a DTensor, or gathered by one, which knows shards of unequal size
            site.vocabulary_shards(module.out_features, f"out_features={module.out_features}")

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        module = site.module
        if isinstance(module, nn.Embedding):
            rows, dim = module.weight.shape
            return {"weight": ParameterLayout(Shard(1), (rows, dim // site.tp), "embedding dimension split")}
        sizes = chunk_sizes(site.parameter("weight").shape[0], site.tp)
        return {
            name: ParameterLayout(Shard(0), (sizes[0], *param.shape[1:]), split_rows("output features", sizes))
            for name, param in module.named_parameters(recurse=False)
        }


@dataclass(frozen=True, kw_only=True)
class Rowwise(_TorchLinear):
    """Linear: input features sharded, x sharded in, y a sum over ranks. Embedding: the vocabulary sharded."""

    name = "rowwise"
    torch_class = RowwiseParallel
    sums_gradients = True

    def build(self, site: Site) -> ParallelStyle:
        return _WritableRowwise(**self.layouts())

    def check(self, site: Site) -> None:
        module = site.require(self.name, nn.Linear, nn.Embedding)
        if isinstance(module, nn.Embedding):
            site.vocabulary_shards(module.num_embeddings, f"vocab_size={module.num_embeddings}")
        else:
            site.divide(module.in_features, "CR201", f"in_features={module.in_features}")

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        module = site.module
        if isinstance(module, nn.Embedding):
            return vocabulary_layout(site)
        layouts = replicated(module, "bias, added once after the sum")
        out, features = site.parameter("weight").shape
        layouts["weight"] = ParameterLayout(Shard(1), (out, features // site.tp), "input features split")
        return layouts


def vocabulary_layout(site: Site) -> dict[str, ParameterLayout]:
    """The layout of a weight [V, D] that is sharded over the vocabulary."""
    rows, dim = site.parameter("weight").shape
    sizes = chunk_sizes(rows, site.tp)
    return {"weight": ParameterLayout(Shard(0), (sizes[0], dim), split_rows("vocabulary", sizes))}


def _make_writable(_: nn.Module, __: Any, out: Any) -> Any:
    """A local output as a tensor that a model may change in place (`x *= scale`, `nn.ReLU(inplace=True)`), without a
    copy.

    What a DTensor hands over is a view made inside an autograd Function, and autograd refuses in-place writes to it.
    Backward keeps neither looked-up rows nor a linear layer's output, so writing into them is safe. `_unsafe_view`
    waits for a collective still in flight, as the first use of the output would.
    """
    local = isinstance(out, Tensor) and not isinstance(out, DTensor)
    return torch.ops.aten._unsafe_view.default(out, out.shape) if local else out


class _WritableRowwise(RowwiseParallel):
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(_make_writable)
        return module


class _WritableColwise(ColwiseParallel):
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(_make_writable)
        return module
