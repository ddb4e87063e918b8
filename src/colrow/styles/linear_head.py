"""A head that returns the loss: where a plan's loss is `linear`, logits are never whole.

FSDP2 gathers the head's weight for the model's forward and may free it right after, so the loss has to be computed
inside that forward. The caller hands the targets over before it; the head takes them, in order, and returns a scalar
in the place of logits. So the model's own code stays as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from colrow.errors import PlanError
from colrow.ops.collectives import all_gather
from colrow.ops.linear_cross_entropy import linear_cross_entropy

Layout = Literal["sequence", "tokens", "whole"]
"""How hidden states come that are no DTensor: a shard of dimension 1, a shard of all tokens in a row, or whole."""

HEAD = "_colrow_linear_head"


@dataclass(frozen=True)
class Expected:
    """Targets of one micro-batch, and what their loss is divided by."""

    targets: Tensor
    num_valid: int | float | Tensor | None
    ignore_index: int


@dataclass
class LinearHead:
    """What a head needs to return the loss; the module keeps it under the name HEAD."""

    mesh: DeviceMesh
    layout: Layout
    chunk: int | None
    label_smoothing: float
    z_loss: float
    expected: deque[Expected] = field(default_factory=deque)

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearHead:
        return LinearHead(self.mesh, self.layout, self.chunk, self.label_smoothing, self.z_loss)


def head_of(model: nn.Module) -> LinearHead | None:
    """The model's linear head; None where it has none (a pipeline stage without the head, say)."""
    found = (getattr(module, HEAD) for module in model.modules() if HEAD in module.__dict__)
    return next(found, None)


def expect_targets(model: nn.Module, micro_batches: Sequence[Expected]) -> None:
    """Hand over the targets of the next forwards, in their order.

    Raises:
        PlanError: the model has no head of style linear_head.
    """
    head = head_of(model)
    if head is None:
        raise PlanError("loss: linear needs a module of style linear_head, the head: give lm_head that style")
    head.expected.clear()  # what a forward that failed has left
    head.expected.extend(micro_batches)


def head_forward(module: nn.Module, x: Tensor) -> Tensor:
    """The forward of a linear head: the loss of the targets that are expected.

    Without gradients and without targets (generation), whole logits.

    Raises:
        PlanError: a forward for training came without targets.
    """
    head: LinearHead = getattr(module, HEAD)
    weight: Tensor | None = module._parameters["weight"]
    assert weight is not None
    n = head.mesh.size()
    if not head.expected:
        if torch.is_grad_enabled():
            raise PlanError(
                "the plan's loss is linear: the head computes the loss itself and needs the targets: call "
                "colrow.model_loss(model, plan, mesh, ids, targets), or the model under torch.no_grad() for logits"
            )
        return _logits(x, weight, head) if n > 1 else F.linear(x, weight)
    now = head.expected.popleft()
    targets, sequence_dim = now.targets, None
    if n > 1 and not isinstance(x, DTensor):
        sequence_dim = {"sequence": 1, "tokens": 0, "whole": None}[head.layout]
        if head.layout == "tokens":
            x, targets = x.flatten(0, -2), targets.flatten()
    return linear_cross_entropy(
        x,
        weight,
        targets,
        mesh_or_group=head.mesh if n > 1 else None,
        sequence_dim=sequence_dim,
        ignore_index=now.ignore_index,
        num_valid=now.num_valid,
        chunk=head.chunk,
        label_smoothing=head.label_smoothing,
        z_loss=head.z_loss,
    )


def _logits(x: Tensor, weight: Tensor, head: LinearHead) -> Tensor:
    """[B, T, V], whole, on each rank."""
    assert isinstance(weight, DTensor)
    if not isinstance(x, DTensor):
        if head.layout == "tokens":
            B, t, D = x.shape
            x = all_gather(x.reshape(B * t, D), head.mesh.get_group()).view(B, -1, D)
        placement = Shard(1) if head.layout == "sequence" else Replicate()
        x = DTensor.from_local(x, head.mesh, [placement], run_check=False)
    logits = F.linear(x.redistribute(placements=[Replicate()]), weight)
    assert isinstance(logits, DTensor)
    return logits.full_tensor()
