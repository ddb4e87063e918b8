"""The style of a head that computes the loss: a plan's `loss: linear`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.errors import PlanError, did_you_mean
from colrow.sharding.local_view import replace_forward
from colrow.styles.base import ParameterLayout, Style, _require
from colrow.styles.linear_head import HEAD, Layout, LinearHead, head_forward
from colrow.styles.site import Site


@dataclass(frozen=True, kw_only=True)
class LinearHeadStyle(Style):
    """Head and loss in one: the weight split over the vocabulary, in parts that need not be equal; what the module
    returns is the loss (`model_loss` hands the targets over). `layout` says how hidden states come that are no
    DTensor: `sequence`, `tokens` or `whole`. For the other options see `colrow.linear_cross_entropy`.
    """

    name = "linear_head"
    on_one_rank = True
    layout: Layout = "sequence"
    chunk: int | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def token_order(self) -> str:  # type: ignore[override]
        return {"sequence": "sequence", "tokens": "row", "whole": ""}[self.layout]

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise PlanError(f"unknown layout {self.layout!r}{did_you_mean(str(self.layout), get_args(Layout))}")
        if self.chunk is not None and self.chunk < 1:
            raise PlanError(f"chunk={self.chunk}: the number of tokens whose logits exist at one time is positive")

    def check(self, site: Site) -> None:
        module = _require(site, self.name, nn.Linear)
        if module.bias is not None:
            raise PlanError(f"{site.fqn}: style linear_head is for a head without bias: use loss vocab_parallel")
        if (site.tp - 1) * -(-module.out_features // site.tp) >= module.out_features:
            raise PlanError(
                f"{site.fqn}: out_features={module.out_features} leaves one of {site.tp} ranks without rows"
            )

    def build(self, site: Site) -> ParallelStyle:
        return _Apply(self)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        rows, dim = site.module.get_parameter("weight").shape
        return {"weight": ParameterLayout(Shard(0), (-(-rows // site.tp), dim), "vocabulary split")}


class _Apply(ParallelStyle):
    def __init__(self, style: LinearHeadStyle) -> None:
        self.style = style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        param: Any = module._parameters["weight"]
        if device_mesh.size() > 1 and not isinstance(param, DTensor):
            placed = distribute_tensor(param.detach(), device_mesh, [Shard(0)])
            module.register_parameter("weight", nn.Parameter(placed, requires_grad=param.requires_grad))
        s = self.style
        module.__dict__[HEAD] = LinearHead(device_mesh, s.layout, s.chunk, s.label_smoothing, s.z_loss)
        replace_forward(module, head_forward)
        return module
