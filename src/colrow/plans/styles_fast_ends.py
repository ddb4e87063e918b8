"""The fast styles of a model's two ends: the embedding and a head that gives logits (see `styles_fast`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.errors import PlanError
from colrow.ops.parallel_linear import column_linear, scatter_sum
from colrow.plans.site import Site
from colrow.plans.styles import Colwise, ParameterLayout, Rowwise, Style, _require
from colrow.plans.styles_fast import FAST, FastStyle, group_name
from colrow.plans.styles_local import _same_on_all_ranks


def embedding_forward(module: Any, ids_BT: Tensor) -> Tensor:
    """The forward of a fast embedding: ids [B, T], whole -> this rank's tokens, [B, T/n, D]."""
    group, n, rank = getattr(module, FAST)
    weight: Tensor = module.weight
    B, T = ids_BT.shape
    index = ids_BT.reshape(-1) - rank * weight.shape[0]
    mine = (index >= 0) & (index < weight.shape[0])
    rows = F.embedding(torch.where(mine, index, 0), weight)
    return scatter_sum(torch.where(mine[:, None], rows, 0.0), group).view(B, T // n, -1)


@dataclass(frozen=True, kw_only=True)
class FastEmbedding(Style):
    """An embedding split over the vocabulary, whose output is this rank's part of the tokens in a row."""

    name = "fast_embedding"
    token_order = "row"

    def check(self, site: Site) -> None:
        module = _require(site, self.name, nn.Embedding)
        if module.padding_idx is not None or module.max_norm is not None or module.scale_grad_by_freq:
            raise PlanError(f"{site.fqn}: fast_embedding knows no padding_idx, max_norm or scale_grad_by_freq")
        Rowwise().check(site)

    def build(self, site: Site) -> ParallelStyle:
        return FastStyle(
            {"weight": Shard(0)},
            {"weight": _same_on_all_ranks},
            embedding_forward,
            lambda mesh: (group_name(mesh), mesh.size(), mesh.get_local_rank()),
        )

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return Rowwise().parameters(site)


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
        _require(site, self.name, nn.Linear)
        Colwise().check(site)

    def build(self, site: Site) -> ParallelStyle:
        names = dict(site.module.named_parameters(recurse=False))
        return FastStyle(
            dict.fromkeys(names, Shard(0)),
            dict.fromkeys(names, _same_on_all_ranks),
            head_forward,
            lambda mesh: (group_name(mesh), mesh, self.gather),
        )

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return Colwise().parameters(site)
