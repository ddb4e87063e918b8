"""Activation checkpointing by block: backward recomputes what forward did not keep.

full: a block keeps its input alone and runs its forward again, its tp collectives too.
selective: by operation. Kept are attention's outputs, the outputs of reduce-scatters and all-reduces, and every second
matrix product. Recomputed are norms, rotations, SwiGLU's product, all-gathers, and the other matmuls. In a Llama block
the matmuls are q, k, v, o, gate, up, down: kept are k, o and up; recomputed are q, v and gate; down is not run again,
since nothing in backward needs its output and recomputation stops early. So no reduction crosses ranks twice, and no
product runs again whose only use is a reduction that is kept. With the fast styles a block has four matmuls, two of
columns and two of rows; the rows' contain their reduce-scatter and are kept, the columns' are recomputed.

A block's forward is replaced on the instance, so names, hooks (FSDP's and the plan's at block level stay outside) and
state dicts are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from colrow.errors import ConfigError, did_you_mean
from colrow.parallel.random_state import Generators
from colrow.styles.base import STYLES

Mode = Literal["none", "selective", "full"]
MODES: tuple[Mode, ...] = get_args(Mode)

_KEPT = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "_c10d_functional::reduce_scatter_tensor",
    "_c10d_functional::all_reduce",
    *(operator for style in STYLES.values() for operator in style.saved_operators),
}
_PRODUCTS = {"aten::mm", "aten::addmm"}


def apply_activation_checkpoint(blocks: Iterable[nn.Module], mode: Mode, *, compiled: bool = False) -> None:
    """Checkpoint each block, in place: after the plan, before data parallelism.

    With compile, `selective` goes first, since the graph has to hold what it chooses among, and `full` second: it runs
    the compiled block again (inside a graph, torch 2.13 cannot order what backward needs when attention, an operator
    that may draw random numbers, is recomputed).

    A recomputation draws the random numbers of the forward: torch's checkpoint sees to its global generators, and here
    the others ([Note: random numbers]) get their state back, but for those in a graph.

    Args:
        compiled: the blocks will be compiled.

    Raises:
        ConfigError: an unknown mode.
    """
    if mode not in MODES:
        raise ConfigError(f"unknown activation_checkpoint {mode!r}{did_you_mean(str(mode), MODES)}")
    if mode == "none":
        return
    for block in blocks:
        contexts = _selective_contexts if mode == "selective" else _no_contexts
        if mode == "full" or not compiled:
            contexts = partial(_with_same_draws, contexts, Generators([block], "cpu"))
        # not reentrant: keyword arguments and hooks work, and recomputation stops at the last tensor that is needed
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""The context around a forward, and the one around its recomputation."""


def _with_same_draws(contexts: Callable[[], Contexts], generators: Generators) -> Contexts:
    """The contexts, with the states of generators beyond torch's set back for the recomputation."""
    forward, recomputation = contexts()
    before: list[Callable[[], None]] = []

    @contextmanager
    def record() -> Iterator[None]:
        before[:] = generators.beyond_torch()
        with forward:
            yield

    @contextmanager
    def replay() -> Iterator[None]:
        after = generators.beyond_torch()
        for restore in before:
            restore()
        try:
            with recomputation:
                yield
        finally:
            for restore in after:
                restore()

    return record(), replay()


def _no_contexts() -> Contexts:
    return nullcontext(), nullcontext()


def _selective_contexts() -> Contexts:
    """torch's contexts for `selective`: what is kept stands in the first lines of this file."""
    # Seen in forward, and in recomputation: each counts for itself, so that both choose the same ones.
    matmuls = {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op.name().partition(".")[0]
        if name in _PRODUCTS:
            matmuls[context.is_recompute] += 1
            keep = matmuls[context.is_recompute] % 2 == 0
        else:
            keep = name in _KEPT
        # PREFER: torch.compile may keep what its graph has anyway; it may not recompute what was to be saved
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: Contexts = create_selective_checkpoint_contexts(policy)
    return contexts
