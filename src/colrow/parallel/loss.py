"""The loss of a plan: on vocabulary-sharded logits, on replicated ones, or in the head itself.

On sharded logits it is torch's loss_parallel, made safe to leave by an exception and to nest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import loss_parallel

from colrow.mesh import Mesh
from colrow.parallel.outputs import main_tensor
from colrow.parallel.parallelize import tp_axis
from colrow.plans.plan import Plan
from colrow.styles.linear_head import PendingTargets, expect_targets
from colrow.torch_compat import dtensor_handlers


@contextmanager
def loss_context(plan: Plan, mesh: Mesh | DeviceMesh) -> Iterator[None]:
    """Around the loss and its backward: `F.cross_entropy` on vocabulary-sharded logits stays sharded.

    Does nothing for a plan whose loss is `replicated` or `linear`, or where tp is 1. Within it call `F.cross_entropy`
    and nothing else that takes a log-softmax of the logits: torch's handler gives that one a wrong gradient
    (pytorch#190746).
    """
    if plan.loss != "vocab_parallel" or tp_degree(mesh) == 1:
        yield
        return
    # loss_parallel swaps handlers of the dispatcher and, left by an exception, leaves them behind (a later loss would
    # use them unasked); entered twice, it fails on exit. So the table is put back as it was.
    handlers = dtensor_handlers()
    before = dict(handlers)
    try:
        with loss_parallel():
            yield
    finally:
        handlers.clear()
        handlers.update(before)


def model_loss(
    model: nn.Module,
    plan: Plan,
    mesh: Mesh | DeviceMesh,
    ids: Tensor,
    targets: Tensor,
    *,
    num_valid: int | float | Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The cross entropy of `model(ids)` as the plan computes it; its backward belongs into the same `loss_context`.

    Args:
        model: parallelised by `plan`. Its output is logits, or has them as `logits` (transformers) or its first tensor.
        ids: [B, T]; targets: [B, T] class numbers, the same on each rank of a tp group.
        num_valid: what the sum over targets is divided by; the number of targets that count, unless given.

    Returns:
        A scalar in fp32 (fp64 for fp64 models); the mean over the targets that count. Losses that the model returns
        beside its logits are not in it.

    Raises:
        PlanError: the loss is `linear` and no module has style linear_head.
    """
    return loss_and_output(model, plan, mesh, ids, targets, num_valid=num_valid, ignore_index=ignore_index)[0]


def loss_and_output(
    model: nn.Module,
    plan: Plan,
    mesh: Mesh | DeviceMesh,
    ids: Tensor,
    targets: Tensor,
    *,
    num_valid: int | float | Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Any]:
    """`model_loss`, and what the model returned, other losses among it."""
    if plan.loss == "linear":
        expect_targets(model, [PendingTargets(targets, num_valid, ignore_index)])
        output = model(ids)
        return main_tensor(output), output
    output = model(ids)
    logits = main_tensor(output).flatten(0, 1)
    # fp32: bf16 has 8 bits of mantissa, too few for sums of exponentials over a vocabulary
    logits = logits if logits.dtype == torch.float64 else logits.float()
    with loss_context(plan, mesh):
        if num_valid is None:
            return F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index), output
        total = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="sum")
        return total / num_valid, output


def tp_degree(mesh: Mesh | DeviceMesh) -> int:
    """The tensor-parallel degree of a mesh."""
    return mesh.tp if isinstance(mesh, Mesh) else tp_axis(mesh).size()
