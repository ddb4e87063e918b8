"""The style of a head that computes the loss, `linear_head`: under a plan's `loss: linear`, no rank holds all logits.

FSDP2 gathers the head's weight for the model's forward and may free it right after, so the loss has to be computed
inside that forward. The caller hands the targets over before it; the head takes them, in order, and returns a scalar
in the place of logits. So the model's own code stays as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.errors import PlanError, did_you_mean
from colrow.ops.collectives import all_gather
from colrow.ops.linear_cross_entropy import linear_cross_entropy
from colrow.sharding.local_view import replace_forward
from colrow.styles.base import ParameterLayout, Style, TokenOrder
from colrow.styles.fast.unflatten import unflatten_tokens
from colrow.styles.linear import vocabulary_layout
from colrow.styles.options import option
from colrow.styles.shards import ShardSpec, place_parameter
from colrow.styles.site import Site

HiddenLayout = Literal["sequence", "flattened", "replicated"]
"""Layout of hidden states that are plain tensors: a shard of dimension 1, a shard of all tokens of the micro-batch
(see [Note: flattened tokens]), or complete on each rank."""
_PREVIOUS_LAYOUTS = {"tokens": "flattened", "whole": "replicated"}

_STATE = "_colrow_linear_head"


@dataclass(frozen=True)
class PendingTargets:
    """Targets of one micro-batch, and what their loss is divided by."""

    targets: Tensor
    num_valid: int | float | Tensor | None
    ignore_index: int


@dataclass(frozen=True)
class HeadState:
    """What a linear head's forward needs, and the targets of the forwards to come."""

    mesh: DeviceMesh
    style: LinearHead
    pending: deque[PendingTargets] = field(default_factory=deque)

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadState:
        return HeadState(self.mesh, self.style)  # a mesh cannot be copied


def _layout_of(value: Any) -> Any:
    layout = _PREVIOUS_LAYOUTS.get(value, value)
    if layout not in get_args(HiddenLayout):
        message = f"unknown layout {layout!r}{did_you_mean(str(layout), get_args(HiddenLayout))}"
        raise PlanError("CR211", "", message, "")
    return layout


@dataclass(frozen=True, kw_only=True)
class LinearHead(Style):
    """Head and loss in one: the weight sharded over the vocabulary ([Note: uneven vocabulary]); what the module returns
    is the loss (`model_loss` hands the targets over). `layout` is that of hidden states that are plain tensors:
    `sequence`, `flattened` or `replicated`. For the other options see `colrow.linear_cross_entropy`.
    """

    name = "linear_head"
    computes_module = True
    on_one_rank = True
    returns_loss = True
    layout: HiddenLayout = option(_layout_of, "sequence")
    chunk: int | None = None

    @property
    def token_order(self) -> TokenOrder:
        return "" if self.layout == "replicated" else self.layout

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk is not None and self.chunk < 1:
            message = f"chunk={self.chunk}: the number of tokens whose logits exist at one time is positive"
            raise PlanError("CR211", "", message, "")

    def check(self, site: Site) -> None:
        module = site.require(self.name, nn.Linear)
        if module.bias is not None:
            message = "style linear_head is for a head without bias"
            raise PlanError("CR206", site.fqn, message, "use loss vocab_parallel")
        site.vocabulary_shards(module.out_features, f"out_features={module.out_features}")

    def build(self, site: Site) -> ParallelStyle:
        return _LinearHeadStyle(self)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return vocabulary_layout(site)


class _LinearHeadStyle(ParallelStyle):
    def __init__(self, style: LinearHead) -> None:
        self.style = style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.size() > 1:  # on one rank the weight stays a plain tensor
            spec = ShardSpec(0, (module.get_parameter("weight").shape[0],))
            place_parameter(module, "weight", device_mesh, spec, self.src_data_rank)
        module.__dict__[_STATE] = HeadState(device_mesh, self.style)
        replace_forward(module, _loss_forward)
        return module


def expect_targets(model: nn.Module, micro_batches: Sequence[PendingTargets]) -> None:
    """Hand over the targets of the next forwards, in their order.

    Raises:
        PlanError: the model has no head of style linear_head.
    """
    state = head_state(model)
    if state is None:
        raise PlanError("loss: linear needs a module of style linear_head, the head: give lm_head that style")
    state.pending.clear()  # a forward that failed has left some
    state.pending.extend(micro_batches)


def head_state(model: nn.Module) -> HeadState | None:
    """The state of the model's linear head; None where it has none (a pipeline stage without the head, say)."""
    found = (getattr(module, _STATE) for module in model.modules() if _STATE in module.__dict__)
    return next(found, None)


def _loss_forward(module: nn.Module, x: Tensor) -> Tensor:
    """The forward of a linear head: hidden states [B, T, D] or this rank's [B, t, D] -> the pending targets' loss.

    Without gradients and without targets (generation) it returns all logits, [B, T, V].

    Raises:
        PlanError: a forward for training came without targets.
    """
    state: HeadState = getattr(module, _STATE)
    style, ranks = state.style, state.mesh.size()
    # as registered: the loss wants the DTensor, whose placement says which classes this rank has
    weight: Tensor | None = module._parameters["weight"]
    assert weight is not None
    if not state.pending:
        if torch.is_grad_enabled():
            raise PlanError(
                "the plan's loss is linear: the head computes the loss itself and needs the targets: call "
                "colrow.model_loss(model, plan, mesh, ids, targets), or the model under torch.no_grad() for logits"
            )
        return _logits(x, weight, state) if ranks > 1 else F.linear(x, weight)
    pending = state.pending.popleft()
    targets, sequence_dim = pending.targets, None
    if ranks > 1 and not isinstance(x, DTensor):
        sequence_dim = {"sequence": 1, "flattened": 0, "replicated": None}[style.layout]
        if style.layout == "flattened":
            x, targets = x.flatten(0, -2), targets.flatten()
    return linear_cross_entropy(
        x,
        weight,
        targets,
        mesh_or_group=state.mesh if ranks > 1 else None,
        sequence_dim=sequence_dim,
        ignore_index=pending.ignore_index,
        num_valid=pending.num_valid,
        chunk=style.chunk,
    )


def _logits(x: Tensor, weight: Tensor, state: HeadState) -> Tensor:
    """[B, T, V] on each rank."""
    assert isinstance(weight, DTensor)
    if not isinstance(x, DTensor):
        if state.style.layout == "flattened":
            x = unflatten_tokens(all_gather(x.flatten(0, 1), state.mesh.get_group()), x)
        placement = Shard(1) if state.style.layout == "sequence" else Replicate()
        x = DTensor.from_local(x, state.mesh, [placement], run_check=False)
    # through DTensors, which gather vocabulary shards of unequal size too: see [Note: uneven vocabulary]
    logits = F.linear(x.redistribute(placements=[Replicate()]), weight)
    assert isinstance(logits, DTensor)
    return logits.full_tensor()
