"""Plans in which the check finds nothing, beside those of `broken_plans`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from colrow.plans.plan import Plan
from helpers import broken_models as m
from helpers.broken_plans import (
    HEADS,
    block_mlp,
    gpt_plan,
    preset,
    second_name_plan,
    shallow,
    shared_blocks,
    shared_plan,
    two_blocks,
)

OWN_HEADS = HEADS | {"attn__out": "rowwise"}


class LocalHeads(m.HeadCount):
    """The same attention, with views that hold for any number of heads."""

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, m.E).transpose(1, 2)


SOUND: dict[str, tuple[Callable[[], nn.Module], Callable[[], Plan]]] = {
    "an MLP in one block": (shallow, lambda: preset(**block_mlp())),
    "heads": (two_blocks, gpt_plan),
    "shared module, keyed by its first name": (shared_blocks, gpt_plan),
    "shared module, keyed by its second name": (shared_blocks, second_name_plan),
    "shared module, keyed by both names": (shared_blocks, lambda: shared_plan("colwise")),
    "moving average of complete tokens": (lambda: m.Gpt(block=m.AveragingBlock), gpt_plan),
    "batch norm of complete tokens": (lambda: m.Gpt(block=m.BatchNormBlock), gpt_plan),
    "batch norm of sequence shards in eval mode": (
        lambda: m.Gpt(block=m.BatchNormBlock).eval(),
        lambda: gpt_plan(sequence=True, bn="grad_sum"),
    ),
    "vocab parallel": (m.Gpt, lambda: gpt_plan("vocab_parallel")),
    "sequence": (two_blocks, lambda: gpt_plan(sequence=True)),
    "sequence, vocab parallel": (two_blocks, lambda: gpt_plan("vocab_parallel", sequence=True)),
    "tied": (lambda: m.Gpt(tied=True), lambda: gpt_plan("vocab_parallel", sequence=True)),
    "biases": (lambda: m.Gpt(lambda: m.Attention("heads", bias=True), lambda: m.MLP(bias=True)), gpt_plan),
    "biases, sequence": (
        lambda: m.Gpt(lambda: m.Attention("heads", bias=True), lambda: m.MLP(bias=True)),
        lambda: gpt_plan(sequence=True),
    ),
    "views for any number of heads": (lambda: m.Gpt(LocalHeads), lambda: gpt_plan(**OWN_HEADS)),
    "head left whole": (m.Gpt, lambda: gpt_plan(head=None)),
    "attention left whole": (lambda: m.Gpt(m.HeadCount), lambda: gpt_plan(attn__qkv=None, attn__out=None)),
    "fused weight left whole": (
        lambda: m.Gpt(lambda: m.Attention("parts")),
        lambda: gpt_plan(attn__qkv=None, attn__out=None),
    ),
    "fused qkv, each part split": (
        lambda: m.Gpt(lambda: m.Attention("parts")),
        lambda: gpt_plan(attn__qkv={"style": "packed_colwise", "segments": [m.D] * 3, "input": "replicate"}),
    ),
    "fused gate and up, each part split": (
        lambda: m.Gpt(mlp=m.GatedMLP),
        lambda: gpt_plan(
            mlp__up=None, mlp__gate_up={"style": "packed_colwise", "segments": [2 * m.D] * 2, "input": "replicate"}
        ),
    ),
    "scale summed over ranks": (
        lambda: m.Gpt(mlp=m.LatentNormMLP),
        lambda: gpt_plan(mlp__scale="grad_sum"),
    ),
    "norms that say replicate": (m.Gpt, lambda: gpt_plan(norm1="replicate", norm2="replicate", norm="replicate")),
    "dropout on whole activations": (
        lambda: m.Gpt(mlp=lambda: nn.Sequential(nn.Linear(m.D, m.D), nn.Dropout(0.1))),
        lambda: gpt_plan(mlp__up=None, mlp__down=None),
    ),
    "dropout on features": (lambda: m.Gpt(mlp=lambda: m.MLP(dropout=0.1)), gpt_plan),
    "dropout on heads": (lambda: m.Gpt(lambda: m.Attention("heads", dropout=0.1)), gpt_plan),
    "some layers frozen": (lambda: _freeze(two_blocks(), "blocks.0"), lambda: gpt_plan(sequence=True)),
    "one layer": (lambda: m.Gpt(layers=1), lambda: gpt_plan(sequence=True)),
    "seven layers": (lambda: m.Gpt(layers=7), lambda: gpt_plan(sequence=True)),
    "embedding dimension split": (m.Gpt, lambda: gpt_plan(embed={"style": "colwise", "output": "replicate"})),
    "torch's own styles": (m.Gpt, lambda: gpt_plan(mlp__up=ColwiseParallel(), mlp__down=RowwiseParallel())),
}


def _freeze(model: nn.Module, name: str) -> nn.Module:
    model.get_submodule(name).requires_grad_(False)
    return model
