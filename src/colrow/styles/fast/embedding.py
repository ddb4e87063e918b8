"""The fast style of an embedding: `fast_embedding`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.ops.parallel_linear import scatter_sum
from colrow.sharding.layout import chunk_sizes
from colrow.sharding.local_view import replace_forward
from colrow.styles.base import ParameterLayout, Style, TokenOrder
from colrow.styles.fast.linear import FORWARD_STATE, group_name
from colrow.styles.fast.unflatten import unflatten_tokens
from colrow.styles.linear import Rowwise, vocabulary_layout
from colrow.styles.local_module import sum_over_ranks
from colrow.styles.options import option
from colrow.styles.rank_tensors import rank_table
from colrow.styles.shards import ShardSpec, shard_parameters
from colrow.styles.site import Site


@dataclass(frozen=True, kw_only=True)
class FastEmbedding(Style):
    """An embedding sharded over the vocabulary, whose output is this rank's shard of the flattened tokens, or with
    `all_tokens` all of them on every rank. What a subclass does with the rows it looked up must be linear in them (a
    scale)."""

    name = "fast_embedding"
    computes_module = True
    all_tokens: bool = option(lambda value: value, False, previous="whole")

    @property
    def token_order(self) -> TokenOrder:
        return "" if self.all_tokens else "flattened"

    def check(self, site: Site) -> None:
        module = site.require(self.name, nn.Embedding)
        if module.max_norm is not None or module.scale_grad_by_freq:
            raise site.wrong_options("fast_embedding knows no max_norm or scale_grad_by_freq", "use style rowwise")
        Rowwise().check(site)

    def build(self, site: Site) -> ParallelStyle:
        return _FastEmbeddingStyle(self.all_tokens)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return vocabulary_layout(site)


@dataclass(frozen=True)
class EmbeddingState:
    """What a fast embedding's forward needs: the module's own forward, the first row of this rank's shard, and the row
    that gets no gradient."""

    lookup: Callable[..., Tensor]
    mesh: DeviceMesh
    group: str
    first_row: Tensor
    padding: int | None
    all_tokens: bool


class _FastEmbeddingStyle(ParallelStyle):
    def __init__(self, all_tokens: bool) -> None:
        self.all_tokens = all_tokens

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        mesh, sizes = device_mesh, chunk_sizes(module.num_embeddings, device_mesh.size())
        # a tensor and no number: the dry run has to know that it differs from rank to rank
        first = rank_table(mesh, [[rank * sizes[0]] for rank in range(mesh.size())])
        lookup: Any = type(module).forward
        state = EmbeddingState(lookup, mesh, group_name(mesh), first, module.padding_idx, self.all_tokens)
        module.padding_idx = None  # a row of the complete table, not of the shard: `_embedding_forward` treats it
        shard_parameters(module, mesh, {"weight": ShardSpec(0, (module.num_embeddings,))}, self.src_data_rank)
        module.__dict__[FORWARD_STATE] = state
        replace_forward(module, _embedding_forward)
        return module


def _embedding_forward(module: Any, ids_BT: Tensor) -> Tensor:
    """The forward of a fast embedding: ids [B, T], the same on each rank -> this rank's tokens [B, T/n, D], or all.

    A rank looks up the tokens in its shard of the vocabulary and has zeros for the others, so the sum over ranks is the
    embedding.
    """
    state: EmbeddingState = getattr(module, FORWARD_STATE)
    index = ids_BT - state.first_row
    own = (index >= 0) & (index < module.weight.shape[0])
    rows = state.lookup(module, torch.where(own, index, 0))  # any row, for another rank's tokens: zeroed below
    if state.padding is not None:  # that row gets no gradient, as in nn.Embedding
        rows = torch.where((ids_BT == state.padding)[..., None], rows.detach(), rows)
    rows = torch.where(own[..., None], rows, 0.0)
    if state.all_tokens:
        return sum_over_ranks(rows, state.mesh, Replicate())
    B, T, D = rows.shape
    return unflatten_tokens(scatter_sum(rows.view(B * T, D), state.group), rows)
