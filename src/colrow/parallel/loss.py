"""The loss on sharded logits: torch's loss_parallel, made safe to leave by an exception and to nest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from colrow.mesh import Mesh
from colrow.plans.plan import Plan


@contextmanager
def loss_context(plan: Plan, mesh: Mesh | DeviceMesh) -> Iterator[None]:
    """Around the loss and its backward: `F.cross_entropy` on vocabulary-sharded logits stays sharded.

    Does nothing for a plan whose loss is `replicated`, or where tp is 1. Within it call `F.cross_entropy` and nothing
    else that takes a log-softmax of the logits: torch's handler gives that one a wrong gradient (pytorch#190746).
    """
    if plan.loss == "replicated" or tp_degree(mesh) == 1:
        yield
        return
    # loss_parallel swaps handlers of the dispatcher and, left by an exception, leaves them behind (a later loss would
    # use them unasked); entered twice, it fails on exit. So the table is put back as it was.
    handlers = DTensor._op_dispatcher._custom_op_handlers
    before = dict(handlers)
    try:
        with loss_parallel():
            yield
    finally:
        handlers.clear()
        handlers.update(before)


def tp_degree(mesh: Mesh | DeviceMesh) -> int:
    """The tensor-parallel degree of a mesh."""
    if isinstance(mesh, Mesh):
        return mesh.tp
    if mesh.mesh_dim_names and "tp" in mesh.mesh_dim_names:
        return mesh["tp"].size()
    return mesh.size()
