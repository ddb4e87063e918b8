"""A small model with the modules of a big one, for verify: fewer layers and smaller widths.

Layers shrink to the first ones, as many as hold every kind and at least two; widths to a few multiples of tp. Heads
keep the ratio of query to kv heads. A size that tp divides becomes one that it divides; a size that it does not divide
stays such a size. A model of an unknown family, or with modules that its class does not build, is taken complete, up
to `LARGEST`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from colrow.dryrun.block_kinds import block_kind, module_kinds, trace_blocks
from colrow.dryrun.calls import example_inputs, is_huggingface
from colrow.errors import PlanError
from colrow.models.blocks import block_stacks

SMALL = 5_000_000
"""A model with at most this number of parameters is verified as it is."""
LARGEST = 100_000_000
"""A model that cannot be shrunk is refused above this number of parameters: verify holds tp + 2 copies in fp64."""

# Keys of transformers' configs that hold one size, by what it counts: a family has one of each.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels")
WIDTH = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
FFN_WIDTH = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
EXPERT_WIDTH = ("moe_intermediate_size", "shared_expert_intermediate_size")
POSITIONS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_LOW_RANK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


def reduced_model(model: nn.Module, tp: int) -> tuple[nn.Module, str | None]:
    """A small model of the same family and the sizes that differ, or the model itself and None when it is small.

    Raises:
        PlanError: it is too big to be verified as it is, and its family is not known.
    """
    size = sum(param.numel() for param in model.parameters())
    if size <= SMALL:
        return model, None
    shrunk = _shrunk(model, tp)
    if shrunk is not None and module_kinds(shrunk[0]) == module_kinds(model):  # else someone changed it once built
        return shrunk
    if size > LARGEST:
        raise PlanError(
            f"{type(model).__name__} has {size / 1e6:.0f} million parameters, and verify holds {tp + 2} copies in fp64 "
            f"({size * 8 * (tp + 2) / 2**30:.0f} GiB): pass a function that builds a smaller one of the same modules"
        )
    return model, None


def _shrunk(model: nn.Module, tp: int) -> tuple[nn.Module, str] | None:
    """A small model of the same class and the sizes that differ; None where its config cannot be made smaller."""
    config = getattr(model, "config", None)
    try:
        if type(model).__module__ == "colrow.models.llama" and config is not None:
            small = _shrink_llama(config, tp)
            return type(model)(small), _changes(vars(config), vars(small))
        if is_huggingface(model) and config is not None:
            small = shrink_huggingface(config, tp, layers_with_every_kind(model))
            return type(model)(small), _changes(config.to_dict(), small.to_dict())
    except Exception:  # a class of the user's own may be built otherwise, and a family may not allow the sizes
        return None
    return None


def _shrink_llama(config: Any, tp: int) -> Any:
    heads, kv = shrink_heads(config.num_attention_heads, config.num_key_value_heads, tp)
    return replace(
        config,
        num_hidden_layers=min(2, config.num_hidden_layers),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=8,
        hidden_size=shrink_width(config.hidden_size, tp, heads * 8),
        intermediate_size=shrink_width(config.intermediate_size, tp, 12 * tp),
        vocab_size=shrink_width(config.vocab_size, tp, 32 * tp),
    )


def shrink_heads(query: int, kv: int, tp: int) -> tuple[int, int]:
    """The smallest head counts with the same ratio of query to kv heads that tp divides where it did before."""
    group = max(1, query // kv)
    for small in range(1, kv):
        if _same_divisibility(small, kv, tp) and _same_divisibility(small * group, query, tp):
            return small * group, small
    return query, kv


def shrink_width(extent: int, tp: int, target: int) -> int:
    """`target`, or a little more, with the remainder of `extent` modulo tp; never more than `extent`."""
    target += (extent - target) % tp
    return min(extent, target)


def _same_divisibility(small: int, big: int, tp: int) -> bool:
    """Whether tp divides both or neither, and is divided by both or neither."""
    return (small % tp == 0) == (big % tp == 0) and (tp % small == 0) == (tp % big == 0)


def layers_with_every_kind(model: nn.Module) -> int:
    """How many of the first layers hold every kind of block ([Note: kinds of blocks]); at least two."""
    traces = trace_blocks(model, lambda copy: example_inputs(copy, 1, 16))
    most = 2
    for stack in block_stacks(model):
        kinds = [block_kind(block, name, {}, traces) for name, block in stack.named_blocks()]
        most = max([most, *(kinds.index(kind) + 1 for kind in set(kinds))])
        if stack.name in traces.irregular:
            most = max(most, len(kinds))
    return most


def shrink_huggingface(config: Any, tp: int, keep: int = 2) -> Any:
    """A config of the same family with small sizes and at least `keep` layers."""
    small = copy.deepcopy(config)
    layer_types: Sequence[Any] = getattr(config, "layer_types", None) or ()
    layers = _first(config, LAYERS) or 2
    # enough layers that each kind occurs (sliding-window attention in every sixth, say)
    keep = min(layers, max([keep, *(list(layer_types).index(name) + 1 for name in set(layer_types))]))
    query = _first(config, QUERY_HEADS) or 1
    heads, kv = shrink_heads(query, _first(config, KV_HEADS) or query, tp)
    dim = 8
    _set(small, LAYERS, keep)
    if layer_types:
        small.layer_types = list(layer_types)[:keep]
    _set(small, QUERY_HEADS, heads)
    _set(small, KV_HEADS, kv)
    _set(small, WIDTH, shrink_width(_first(config, WIDTH) or heads * dim, tp, heads * dim))
    _resize(config, small, (*FFN_WIDTH, *EXPERT_WIDTH), lambda extent: shrink_width(extent, tp, 12 * tp))
    _set(small, POSITIONS, 128)
    _resize(config, small, EXPERTS, lambda count: min(4, count))
    _set(small, HEAD_DIM, dim)
    for name, extent in _LOW_RANK.items():
        _set(small, (name,), extent)
    _resize(config, small, ("sliding_window",), lambda extent: min(extent, 8))
    _resize(config, small, ("first_k_dense_replace",), lambda layers: min(layers, 1))
    vocab = shrink_width(int(config.vocab_size), tp, 32 * tp)
    small.vocab_size = vocab
    _resize(
        config, small, ("pad_token_id", "bos_token_id", "eos_token_id"), lambda token: token if token < vocab else 0
    )
    return small


def _first(config: Any, names: Sequence[str]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _set(config: Any, names: Sequence[str], value: int) -> None:
    for name in names:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, value)


def _resize(config: Any, small: Any, names: Sequence[str], size: Callable[[int], int]) -> None:
    for name in names:
        if isinstance(given := getattr(config, name, None), int):
            setattr(small, name, size(given))


def _changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    changed = [f"{k} {before[k]} → {v}" for k, v in after.items() if isinstance(v, int) and before.get(k) != v]
    return ", ".join(changed)
