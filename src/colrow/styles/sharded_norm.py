"""The style of a norm over a dimension that is itself sharded: `sharded_norm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.styles.base import ParameterLayout, Style
from colrow.styles.shards import ShardSpec, place_parameter
from colrow.styles.site import Site


@dataclass(frozen=True, kw_only=True)
class ShardedNorm(Style):
    """A norm over a last dimension that is itself sharded (q and k norms over all heads at once): weight and
    activations are shards, and the mean over the dimension is one small all-reduce."""

    name = "sharded_norm"

    def check(self, site: Site) -> None:
        for name, param in site.module.named_parameters(recurse=False):
            if param.dim() != 1:
                raise site.wrong_class(f"style sharded_norm is for norms with one-dimensional parameters, not {name}")
            site.divide(int(param.shape[0]), "CR201", f"{name}: width {param.shape[0]}")

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
            place_parameter(module, name, device_mesh, ShardSpec(0, tuple(param.shape)), self.src_data_rank)

        def before(_: nn.Module, args: Any) -> Any:
            x = args[0]
            # of a DTensor that is sharded along the normed dim, DTensor's own rule all-reduces the mean
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, [Shard(x.ndim - 1)], run_check=False)
            return (x, *args[1:])

        def after(_: nn.Module, __: Any, out: DTensor) -> Tensor:
            # already a shard of the last dim where the norm kept the placement: then this sends nothing
            return out.redistribute(placements=[Shard(out.ndim - 1)]).to_local()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        return module
