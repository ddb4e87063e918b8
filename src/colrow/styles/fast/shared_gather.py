"""The fast style of a module whose output several blocks take, such as the norm before attention and MLP side by side:
`fast_gather_output`. One all-gather and one matmul serve all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.styles.base import ParameterLayout, replicated
from colrow.styles.fast.column import SiblingGather, SiblingOutputs, check_columns
from colrow.styles.fast.linear import FastLinear, multiplies
from colrow.styles.options import names_of, option
from colrow.styles.shards import ShardSpec, shard_parameters
from colrow.styles.site import Site

COLUMNS = "_colrow_columns"
"""Module attribute: the linears that take the module's output. Read from the module, so that torch.compile sees the
same code in equal layers."""


@dataclass(frozen=True, kw_only=True)
class FastGatherOutput(FastLinear):
    """The module works on this rank's tokens; its output is gathered once, for the `columns`, which are named from the
    module around this one (`[self_attn.q_proj, mlp.up_proj]`) and have style fast_colwise or fast_kv_replicate.

    The module's own parameters are replicated, and their gradients summed over tp. For the other options see
    `FastGather`.
    """

    name = "fast_gather_output"
    on_data_axes = True
    computes_module = False  # its own forward runs, on this rank's tokens
    sums_gradients = True
    operator = "column_forward"
    columns: tuple[str, ...] = option(names_of, ())
    keep_gathered: bool = True

    def check(self, site: Site) -> None:
        check_columns(site, self.name, self.columns, _around(site))

    def build(self, site: Site) -> ParallelStyle:
        return _GatherOutputHook(self, site)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return replicated(site.module, "used on this rank's tokens; gradients summed over tp")


def _around(site: Site) -> nn.Module:
    return site.model.get_submodule(site.fqn.rpartition(".")[0])


class _GatherOutputHook(ParallelStyle):
    def __init__(self, style: FastGatherOutput, site: Site) -> None:
        self.style, self.fqn, self.around = style, site.fqn, _around(site)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.size() > 1:  # on one rank parameters stay plain tensors
            names = [name for name, _ in module.named_parameters(recurse=False)]
            shard_parameters(module, device_mesh, dict.fromkeys(names, ShardSpec()), self.src_data_rank)
        # past nn.Module.__setattr__: they stay submodules of the modules that own them, and of no other
        module.__dict__[COLUMNS] = tuple(self.around.get_submodule(column) for column in self.style.columns)
        # no argument: it gathers what the module returns
        gather = SiblingGather(self.fqn, self.style.columns, None, self.style.linear_state(device_mesh))
        multiplies(module, module.__dict__[COLUMNS], gather.state)

        def after(module: nn.Module, _: Any, out_BtD: Tensor) -> SiblingOutputs:
            return gather.outputs(module, module.__dict__[COLUMNS], out_BtD)

        module.register_forward_hook(after)
        return module
