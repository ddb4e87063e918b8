"""The fast style of a block whose input does not go into column linears alone: `fast_block`.

It is what `local_block` is among the plain styles, on flattened tokens: all-gather in, reduce-scatter out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.ops.parallel_linear import gather, scatter_sum
from colrow.styles.fast.linear import FlattenedTokens, argument_at, group_name, with_argument
from colrow.styles.fast.tokens import Keys, keys_of, outputs_over_tokens, over_tokens, tensor_argument
from colrow.styles.local_block import BlockShards
from colrow.styles.local_buffers import view_buffers
from colrow.styles.local_module import mark_grads_summed_at_entry
from colrow.styles.options import option
from colrow.styles.rank_tensors import rank_heads
from colrow.styles.shards import shard_parameters, shards_of
from colrow.styles.site import Site


@dataclass(frozen=True, kw_only=True)
class FastBlock(FlattenedTokens, BlockShards):
    """A module that runs on local tensors and all tokens. `gather` names the arguments (numbers or names) that come as
    this rank's tokens and that each rank uses in its own way; `scatter` the outputs (numbers) that are one term of a
    sum over ranks, which become this rank's tokens of the sum. For `slices` and `shards` see `BlockShards`.
    """

    name = "fast_block"
    gather: Keys = option(keys_of, ())
    scatter: tuple[int, ...] = option(keys_of, ())
    slices: dict[str, Any] | None = None
    shards: dict[str, Any] | None = option(shards_of)

    def build(self, site: Site) -> ParallelStyle:
        return _FastBlockHooks(self, site)


class _FastBlockHooks(ParallelStyle):
    def __init__(self, style: FastBlock, site: Site) -> None:
        self.style, self.fqn = style, site.fqn
        self.specs = style.specs(site)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style, mesh, group, fqn = self.style, device_mesh, group_name(device_mesh), self.fqn
        shard_parameters(module, mesh, self.specs, self.src_data_rank)
        view_buffers(module, mesh, self.specs)
        mark_grads_summed_at_entry(module)  # by `gather`, whose backward is a reduce-scatter

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            for key in style.gather:
                x = tensor_argument(fqn, style.name, args, kwargs, key)
                args, kwargs = with_argument(args, kwargs, key, over_tokens(gather, x, group))
            for name, heads in (style.slices or {}).items():
                key = int(name) if name.isdigit() else name
                value = argument_at(args, kwargs, key)
                if isinstance(value, Tensor):
                    args, kwargs = with_argument(args, kwargs, key, rank_heads(value, mesh, **heads))
            return args, kwargs

        module.register_forward_pre_hook(before, with_kwargs=True)
        if style.scatter:
            module.register_forward_hook(lambda _, __, out: outputs_over_tokens(scatter_sum, out, style.scatter, group))
        return module
