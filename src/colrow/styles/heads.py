"""Attention heads under tensor parallelism: what divides, and which kv heads a rank's query heads need.

H query heads, K kv heads, head_dim d, t = tp. Rank r computes query heads r*H/t .. (r+1)*H/t. Query head h uses kv
head h // (H/K). Where t divides K, a rank's kv heads are a shard. Where it does not, neighbouring ranks need the same
kv head: k and v are replicated, and each computes the heads that its queries need.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

from torch import nn

from colrow.errors import PlanError
from colrow.styles.site import Site


@dataclass(frozen=True)
class Heads:
    """Query heads, kv heads, and the width of one head."""

    query: int
    kv: int
    dim: int

    def kv_heads_of_rank(self, tp: int, rank: int) -> list[int]:
        """The kv heads that rank computes, in order; the same number on each rank.

        Every head in the list serves equally many consecutive query heads, so that grouped-query attention over
        the local heads is the global one. A head stands twice where the ranks' boundaries cut its group unevenly.
        """
        per_rank, group = self.query // tp, self.query // self.kv
        run = gcd(per_rank, group)  # the longest run of query heads that never crosses a rank's or a group's border
        return [(rank * per_rank + i * run) // group for i in range(per_rank // run)]


def heads_of(model: nn.Module) -> Heads | None:
    """The attention heads that the model's config states for all layers, under Hugging Face's names."""
    config: Any = getattr(model, "config", None)
    try:
        query = getattr(config, "num_attention_heads", None)
        if not isinstance(query, int):
            return None
        kv = getattr(config, "num_key_value_heads", None) or query
        width = getattr(config, "hidden_size", None)
        dim = getattr(config, "head_dim", None) or (width // query if width else None)
    except RuntimeError:  # transformers raises where layers differ, as those of Gemma 4 do
        return None
    return Heads(query, kv, dim) if dim else None


def check_heads(site: Site) -> None:
    """Raise PlanError when a column split of an attention projection would cut through a head."""
    heads, leaf = heads_of(site.model), site.fqn.rpartition(".")[2]
    if heads is None or leaf not in ("q_proj", "k_proj", "v_proj"):
        return
    out = getattr(site.module, "out_features", None)
    if leaf == "q_proj" and out == heads.query * heads.dim:
        site.divide(heads.query, "CR202", f"n_heads={heads.query}")
    # a projection of another size is not of these heads (a latent one, say): only its features have to divide
    if leaf != "q_proj" and out == heads.kv * heads.dim and heads.kv % site.tp:
        legal = [d for d in range(1, heads.kv + 1) if heads.kv % d == 0]
        raise PlanError(
            "CR203",
            site.fqn,
            f"n_kv_heads={heads.kv} is not divisible by tp={site.tp}",
            f"choose tp from {', '.join(map(str, legal))}, or replicate the kv heads with style kv_replicate",
        )
