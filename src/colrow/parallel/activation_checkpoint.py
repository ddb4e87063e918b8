"""Activation checkpointing by block: backward recomputes what forward did not keep.

full: a block keeps its input alone and runs its forward again, its tp collectives too.
selective: by operation. Kept are attention's outputs, the outputs of reduce-scatters and all-reduces, and every second
matrix product. Recomputed are norms, rotations, SwiGLU's product, all-gathers, and the other products. In a Llama block
the products are q, k, v, o, gate, up, down: kept are k, o and up; recomputed are q, v and gate; down is not run again,
since nothing in backward needs its output and recomputation stops early. So no reduction crosses ranks twice, and no
product runs again whose only use is a reduction that is kept. With the fast styles a block has four products, two of
columns and two of rows; the rows' carry their reduce-scatter and are kept, the columns' are recomputed.

A block's forward is replaced on the instance, so names, hooks (FSDP's and the plan's at block level stay outside) and
state dicts are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from colrow.errors import ConfigError, did_you_mean

Mode = Literal["none", "selective", "full"]
MODES: tuple[Mode, ...] = ("none", "selective", "full")

_KEPT = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "_c10d_functional::reduce_scatter_tensor",
    "_c10d_functional::all_reduce",
    "colrow::row_forward",  # a product and its reduce-scatter in one
}
_PRODUCTS = {"aten::mm", "aten::addmm"}


def apply_activation_checkpoint(blocks: Iterable[nn.Module], mode: Mode) -> None:
    """Checkpoint each block, in place: after the plan, before compile and data parallelism.

    Raises:
        ConfigError: an unknown mode.
    """
    if mode not in MODES:
        raise ConfigError(f"unknown activation_checkpoint {mode!r}{did_you_mean(str(mode), MODES)}")
    if mode == "none":
        return
    for block in blocks:
        block.forward = _selective(block.forward) if mode == "selective" else WholeBlock(block.forward)


class WholeBlock:
    """A block's forward that runs again in backward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def _selective(forward: Callable[..., Any]) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    products = {False: 0, True: 0}  # seen in forward, in recomputation

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op.name().partition(".")[0]
        if name in _PRODUCTS:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 0
        else:
            keep = name in _KEPT
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(policy)
    return contexts
