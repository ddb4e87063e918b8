"""The fast styles of a model's two ends: the embedding and a head that gives logits (see `styles_fast`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.errors import PlanError
from colrow.ops.parallel_linear import column_linear, scatter_sum
from colrow.sharding.local_view import replace_forward
from colrow.styles.base import Colwise, ParameterLayout, Rowwise, Style, _require
from colrow.styles.cuts import Cut, place, reduced
from colrow.styles.fast.common import FAST, CutLinear, group_name, require_product
from colrow.styles.local import rank_table
from colrow.styles.site import Site


@dataclass(frozen=True)
class Lookup:
    """What a fast embedding needs: its own forward, where its rows begin, and the row that gets no gradient."""

    forward: Callable[..., Tensor]
    mesh: DeviceMesh
    group: str
    first_row: Tensor
    padding: int | None
    whole: bool


def embedding_forward(module: Any, ids_BT: Tensor) -> Tensor:
    """The forward of a fast embedding: ids [B, T], whole -> this rank's tokens, [B, T/n, D], or all of them."""
    lookup: Lookup = getattr(module, FAST)
    index = ids_BT - lookup.first_row
    mine = (index >= 0) & (index < module.weight.shape[0])
    rows = lookup.forward(module, torch.where(mine, index, 0))
    if lookup.padding is not None:
        rows = torch.where((ids_BT == lookup.padding)[..., None], rows.detach(), rows)
    rows = torch.where(mine[..., None], rows, 0.0)
    if lookup.whole:
        return reduced(rows, lookup.mesh, Replicate())
    B, T, D = rows.shape
    return scatter_sum(rows.view(B * T, D), lookup.group).view(B, -1, D)


@dataclass(frozen=True, kw_only=True)
class FastEmbedding(Style):
    """An embedding split over the vocabulary, whose output is this rank's part of the tokens in a row, or with `whole`
    all tokens on every rank. What a subclass does with the rows it looked up must be linear in them (a scale)."""

    name = "fast_embedding"
    whole: bool = False

    @property
    def token_order(self) -> str:  # type: ignore[override]
        return "" if self.whole else "row"

    def check(self, site: Site) -> None:
        module = _require(site, self.name, nn.Embedding)
        if module.max_norm is not None or module.scale_grad_by_freq:
            raise PlanError(f"{site.fqn}: fast_embedding knows no max_norm or scale_grad_by_freq")
        Rowwise().check(site)

    def build(self, site: Site) -> ParallelStyle:
        return _LookupStyle(self.whole)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return Rowwise().parameters(site)


class _LookupStyle(ParallelStyle):
    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        mesh, rows = device_mesh, module.num_embeddings // device_mesh.size()
        first = rank_table(mesh, [[rank * rows] for rank in range(mesh.size())])
        own: Any = type(module).forward
        lookup = Lookup(own, mesh, group_name(mesh), first, module.padding_idx, self.whole)
        module.padding_idx = None  # it counts rows of the whole table
        place(module, mesh, {"weight": Cut(0, (module.num_embeddings,))})
        module.__dict__[FAST] = lookup
        replace_forward(module, embedding_forward)
        return module


def head_forward(module: Any, x_BtD: Tensor) -> Tensor:
    """The forward of a fast head: logits [B, T, V], split over the vocabulary as a DTensor, or whole."""
    group, mesh, gather = getattr(module, FAST)
    B, t, D = x_BtD.shape
    weight: Tensor = module.weight
    y = column_linear(x_BtD.reshape(B * t, D), [weight], group).view(B, t * mesh.size(), -1)
    if module.bias is not None:
        y = y + module.bias
    logits = DTensor.from_local(y, mesh, [Shard(2)], run_check=False)
    return logits.redistribute(placements=[Replicate()]).to_local() if gather else logits


@dataclass(frozen=True, kw_only=True)
class FastHead(Style):
    """A head split over the vocabulary, on tokens in a row. `gather` gives whole logits, for loss replicated."""

    name = "fast_head"
    token_order = "row"
    gather: bool = False

    def check(self, site: Site) -> None:
        require_product(site, self.name)
        Colwise().check(site)

    def build(self, site: Site) -> ParallelStyle:
        cuts = {name: Cut(0, (param.shape[0],)) for name, param in site.module.named_parameters(recurse=False)}
        return CutLinear(cuts, head_forward, lambda mesh: (group_name(mesh), mesh, self.gather))

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return Colwise().parameters(site)
