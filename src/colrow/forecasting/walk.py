"""One micro-batch of one rank on fake tensors, as training runs it: what it allocates, computes and sends.

The copy of the model has its widths and at most two blocks of each kind. It is split by the plan over a mesh of tp
alone, in the compute dtype, with recomputation, and with compiled blocks where training compiles. torch.compile traces
and partitions these; the partition runs operator by operator, so backward keeps what it keeps on a GPU.
Data axes and pipelines are added by `memory.py` and `traffic.py`, which know their rules.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colrow.dryrun.block_kinds import BlockTraces, trace_blocks
from colrow.dryrun.calls import Inputs, call_model, default_loss, example_inputs, token_ids
from colrow.dryrun.fake_world import fake_tp_mesh, materialize_fake
from colrow.dryrun.reduced_copy import ReducedCopy, reduced_copy
from colrow.forecasting.storages import LiveStorages, StepSegment
from colrow.mesh import Mesh
from colrow.models.blocks import block_stacks
from colrow.ops.gpu_shapes import as_on_gpu
from colrow.parallel.activation_checkpoint import Mode, apply_activation_checkpoint
from colrow.parallel.compile import compile_forward
from colrow.parallel.data_parallel import head_unit
from colrow.parallel.loss import loss_and_output, loss_context
from colrow.parallel.outputs import auxiliary_losses
from colrow.parallel.parallelize import parallelize, style_on_one_rank
from colrow.parallel.quantized_shards import QuantizedMatmul, quantized_matmuls
from colrow.plans.plan import Plan
from colrow.sharding.layout import full_tensor, local_tensor
from colrow.torch_compat import fake_tensors, tensors_in, watched_propagation

ROOT, HEAD = "", "head"
"""Units beside the blocks ([Note: FSDP2 units] in `parallel.data_parallel`)."""
_PARTITIONED = "aot_eager_decomp_partition"
"""torch's backend that traces, decomposes and partitions as inductor does, and runs the two graphs eagerly."""


@dataclass(frozen=True)
class Cell:
    """What a walk depends on, beside model and plan.

    Attributes:
        micro_batch: sequences of a forward.
        data_axes: at tp 1, styles that help on data axes are applied: see `applies_on_data_axes`.
    """

    tp: int = 1
    micro_batch: int = 1
    seq_len: int = 2048
    recompute: Mode = "none"
    compiled: bool = True
    dtype: torch.dtype = torch.bfloat16
    data_axes: bool = False


@dataclass(frozen=True)
class UnitParameters:
    """Parameters of one unit on a tp rank: a block, or what lies outside of all blocks.

    Attributes:
        numels: of each parameter, local to the rank, with the length of its dim 0.
        trained: of those that get a gradient; partial: elements of those whose gradient is a partial sum over tp.
        gradient_count: elements of the gradients on the rank: DTensor gives an embedding that is split by rows the
            gradient of the complete table.
        in_8_bits: of those that `fsdp.gather_fp8` gathers so, as `numels`; matmuls: of them, each with one scale.
    """

    numels: tuple[tuple[int, int], ...]
    trained: tuple[tuple[int, int], ...]
    partial: tuple[int, ...] = ()
    gradient_count: int = 0
    in_8_bits: tuple[tuple[int, int], ...] = ()
    matmuls: int = 0

    @property
    def count(self) -> int:
        return sum(numel for numel, _ in self.numels)

    @property
    def trained_count(self) -> int:
        return sum(numel for numel, _ in self.trained)


@dataclass(frozen=True)
class Walk:
    """What one micro-batch showed.

    Attributes:
        segments: in order; blocks stand for `repeats` blocks each.
        units: parameters by the block's name, and of ROOT and HEAD.
        order: the blocks' names in the order of their forward.
        boundary: bytes of a block's output on this rank.
    """

    cell: Cell
    segments: tuple[StepSegment, ...]
    units: Mapping[str, UnitParameters]
    order: tuple[str, ...]
    repeats: Mapping[str, int]
    boundary: int

    @property
    def layers(self) -> int:
        return sum(self.repeats[name] for name in self.order)


def applies_on_data_axes(plan: Plan, mesh: Mesh) -> bool:
    """Whether ranks of data axes without tp run other operators than one process."""
    styles = plan.modules.values()
    added = (style.applies(1, data_axes=True) and not style.applies(1, data_axes=False) for style in styles)
    return mesh.tp == 1 and mesh.dp > 1 and any(added)


def block_traces(model: nn.Module, cell: Cell) -> BlockTraces:
    """Which blocks of the model are alike; the same for every cell, so that callers may keep it."""
    return trace_blocks(
        model, lambda copy: example_inputs(copy, cell.micro_batch, min(cell.seq_len, 64)).like_on_cpu(), cell.dtype
    )


def walk(model: nn.Module, plan: Plan, cell: Cell, traces: BlockTraces | None = None, *, keep: int = 2) -> Walk:
    """Run a copy of `model`, which may lie on the meta device and is not changed.

    Args:
        traces: of `block_traces`.
        keep: blocks of each kind in the copy; the second one's input comes from a block, as for all later ones.

    Raises:
        PlanError: the plan does not fit the model at this degree; or the model takes inputs that nothing shows.
    """
    styles = plan.styles_of(model)
    copy = reduced_copy(model, styles, block_traces(model, cell) if traces is None else traces, keep)
    reduced = copy.renamed_plan(plan, styles)
    with warnings.catch_warnings(), fake_tp_mesh(cell.tp) as mesh, _quiet_compiler(cell.compiled), _without_gpus():
        warnings.simplefilter("ignore")
        return _run(copy, _parallelized(copy.model, reduced, mesh, cell), reduced, mesh, cell)


def _parallelized(model: nn.Module, plan: Plan, mesh: DeviceMesh, cell: Cell) -> nn.Module:
    if cell.tp > 1:
        return parallelize(model, plan, mesh)
    plan.check_shapes(model, 1)
    style_on_one_rank(model, plan.resolve(model), mesh, data_axes=cell.data_axes)  # the mesh has no data axes
    return model


def _run(copy: ReducedCopy, model: nn.Module, plan: Plan, mesh: DeviceMesh, cell: Cell) -> Walk:
    """Forward and backward of the split copy on fake tensors, cut into segments at its blocks."""
    blocks = {name: block for stack in block_stacks(model) for name, block in stack.named_blocks()}
    with fake_tensors():
        materialize_fake(model, cell.dtype)
        _wrap(list(blocks.values()), cell)
        inputs = example_inputs(model, cell.micro_batch, cell.seq_len).like_on_cpu()
        # weights exist before the step: `memory.py` counts them, by unit
        given = [local_tensor(t) for t in (*model.parameters(), *model.buffers())]
        storages = LiveStorages(given, fused=cell.compiled)
        order: list[str] = []
        sent: dict[str, int] = {}
        for name, block in blocks.items():
            _cut_at(block, name, storages, order, sent)
        for param in model.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(lambda p: storages.mark_gradient(local_tensor(p.grad)))
        with (
            as_on_gpu(),
            _fused_norms(),
            _flash_attention(),
            _one_document(),
            watched_propagation(storages.suspend, storages.resume),
        ):
            with storages, loss_context(plan, mesh):
                _loss(model, plan, mesh, inputs).backward()
    repeats = {name: copy.count(name) for name in blocks}
    boundary = max(sent.values(), default=0)
    return Walk(cell, tuple(storages.finish()), _units(model, blocks), tuple(order), repeats, boundary)


def _loss(model: nn.Module, plan: Plan, mesh: DeviceMesh, inputs: Inputs) -> Tensor:
    ids = token_ids(inputs.given)
    if ids is None or len(inputs) > 1:
        return default_loss(call_model(model, inputs), inputs.given)
    loss, output = loss_and_output(model, plan, mesh, ids, torch.zeros_like(ids), num_valid=ids.numel())
    for auxiliary in auxiliary_losses(output).values():
        loss = full_tensor(loss) + full_tensor(auxiliary).to(loss.dtype)
    return loss


def _wrap(blocks: list[nn.Module], cell: Cell) -> None:
    """Wrap blocks as `train.setup.wrap_blocks` does: selective recomputation inside the graph, full around it."""
    if cell.recompute == "selective":
        apply_activation_checkpoint(blocks, "selective", compiled=cell.compiled)
    if cell.compiled:
        for block in blocks:
            # sizes are numbers here: a second trace with symbols for them fails in DTensor ("unhashable SymInt")
            compile_forward(block, backend=_PARTITIONED, dynamic=False)
    if cell.recompute == "full":
        apply_activation_checkpoint(blocks, "full")


def _cut_at(block: nn.Module, name: str, storages: LiveStorages, order: list[str], sent: dict[str, int]) -> None:
    """Start a segment where the block begins and ends, in forward and in backward."""

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        order.append(name)
        for x in _differentiable((args, kwargs)):
            x.register_hook(lambda grad: storages.end(name))
            break  # the first is the hidden states, whose gradient ends the block's backward
        storages.begin(name, backward=False)

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        storages.begin("", backward=False)
        for y in _differentiable(output):
            sent[name] = local_tensor(y.detach()).numel() * y.element_size()
            y.register_hook(lambda grad: storages.begin(name, backward=True))
            break

    block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
    block.register_forward_hook(leave)


def _differentiable(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tensors_in(values) if leaf.requires_grad)


def _units(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, UnitParameters]:
    units = {name: list(block.parameters()) for name, block in blocks.items()}
    units[HEAD] = [param for module in head_unit(model, list(blocks.values())) for param in module.parameters()]
    inside = {id(param) for params in units.values() for param in params}
    units[ROOT] = [param for param in model.parameters() if id(param) not in inside]
    matmuls = {name: quantized_matmuls(model, [block]) for name, block in blocks.items()}
    return {name: _unit(params, matmuls.get(name, [])) for name, params in units.items()}


def _unit(params: list[nn.Parameter], matmuls: list[QuantizedMatmul]) -> UnitParameters:
    def sizes(chosen: list[nn.Parameter]) -> tuple[tuple[int, int], ...]:
        local = [local_tensor(param.detach()) for param in chosen]
        return tuple((t.numel(), t.shape[0] if t.dim() else 1) for t in local)

    partial = [param for param in params if isinstance(param.grad, DTensor) and param.grad.placements[0].is_partial()]
    trained = [param for param in params if param.requires_grad]
    gradients = sum(local_tensor(param if param.grad is None else param.grad).numel() for param in trained)
    in_8_bits = sizes([weight for matmul in matmuls for weight in matmul.weights])
    partial_numels = tuple(numel for numel, _ in sizes(partial))
    return UnitParameters(sizes(params), sizes(trained), partial_numels, gradients, in_8_bits, len(matmuls))


@contextmanager
def _quiet_compiler(compiled: bool) -> Iterator[None]:
    """The compiler's graphs of fake tensors are dropped afterwards: a training in this process compiles its own.

    Its warnings are about this walk, not the run; loggers of torch's modules have levels of their own."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
        if compiled:
            torch.compiler.reset()


@contextmanager
def _without_gpus() -> Iterator[None]:
    """The compiler saves the random state of a GPU that it sees. That makes a context, which holds half a GiB of the
    GPU while this process lives, and which torch refuses where it happens inside a checkpointed forward."""
    with _replaced(torch.cuda, "is_available", lambda: False):
        yield


@contextmanager
def _one_document() -> Iterator[None]:
    """transformers asks the positions whether a row holds several documents, which fake tensors cannot say, and then
    builds a mask. Training gives it one document a row: there is no mask, and attention is causal."""
    masks = sys.modules.get("transformers.masking_utils")
    with nullcontext() if masks is None else _replaced(masks, "find_packed_sequence_indices", lambda *_, **__: None):
        yield


@contextmanager
def _replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    before = getattr(owner, name, None)
    if before is None:
        yield
        return
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _FusedNorm(torch.autograd.Function):
    """What a GPU's kernel for an RMS norm allocates: the output and one number a row. On CPUs torch composes the norm
    of operators that keep fp32 copies. The values are not those of a norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x[..., :1].float())
        return x * 1 if weight is None else x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        if weight is None:
            return grad * x, None
        return grad * x, (grad * x).sum(tuple(range(x.dim() - 1))) if ctx.needs_input_grad[1] else None


@contextmanager
def _fused_norms() -> Iterator[None]:
    composed = F.rms_norm

    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if torch.compiler.is_compiling() or len(shape) != 1:  # the compiler decomposes the norm on GPUs too
            return composed(x, shape, weight, eps)
        normed: Tensor = _FusedNorm.apply(x, weight)
        return normed

    with _replaced(F, "rms_norm", rms_norm):
        yield


@contextmanager
def _flash_attention() -> Iterator[None]:
    """GPUs' kernels draw the mask of dropout inside. Those of CPUs have none: torch composes attention of operators
    that keep several numbers for each pair of tokens."""
    attend = F.scaled_dot_product_attention

    def without_dropout(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *more: Any,
        **named: Any,
    ) -> Tensor:
        return attend(query, key, value, attn_mask, 0.0, *more, **named)

    with _replaced(F, "scaled_dot_product_attention", without_dropout):
        yield
