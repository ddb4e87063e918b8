"""AdamW in one pass over memory: gradient scaling, both moments, the weight, and its low-precision copy.

Separate passes for clipping, update and copy move half as many bytes again. In one pass each number is read and
written once: 28 bytes a parameter with a bf16 gradient and a bf16 copy. One launch updates all tensors: a launch for
each takes 150 us of CPU time, 45 ms a step for a model of 291 tensors.

For gradient g, step t (from 1), rate r, decay w (Loshchilov & Hutter 2019):

    g <- scale g
    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    p <- p - r w p - r m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from colrow.ops.kernels.optional_triton import tl, triton

_BLOCK = 1024
_CHUNK = 4 * _BLOCK
"""Elements of one tensor that a program updates: 4 TB/s on an H200, with 8 bytes of `_Table.chunks` for each 4,096."""

_COLUMNS = 7
"""A row of the table: addresses of param, grad, exp_avg, exp_avg_sq, copy and step, and the number of elements."""

_STEP = 5  # its column: a scalar, read by itself, so its alignment does not matter

_ALIGNMENT = 16
"""If it divides addresses (in bytes) and numbers of elements, Triton emits vector loads."""


class ParamUpdate(NamedTuple):
    """What the update of a parameter reads and writes, all on one device.

    `param`, `exp_avg` and `exp_avg_sq` are of one dtype, fp32 or fp64; `grad` and `copy`, which may be missing, of any.
    All five have the same strides, without gaps. `step` is an fp32 scalar tensor that counts this update already.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    copy: Tensor | None = None


class KernelKey(NamedTuple):
    """What a kernel is specialized on: updates with equal keys share a launch."""

    wide: torch.dtype
    grad: torch.dtype
    copy: torch.dtype | None
    aligned: bool


class FusedAdamW:
    """Runs updates: the Triton kernel on GPUs, with one launch for each key; plain torch elsewhere.

    It keeps the tables of addresses that the kernels read: as long as no tensor moves, nothing is uploaded again.
    """

    def __init__(self) -> None:
        self._tables: dict[KernelKey, _Table] = defaultdict(_Table)

    def __call__(
        self,
        updates: Sequence[ParamUpdate],
        lr: Tensor,
        scale: Tensor,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """Run the updates in place.

        Args:
            lr, scale: scalar tensors on the parameters' device. `scale` multiplies the gradients.
        """
        rows: dict[KernelKey, list[int]] = defaultdict(list)
        for update in updates:
            if triton is None or not update.param.is_cuda:
                adamw_reference(update, lr, scale, betas, eps, weight_decay)
            elif row := _row_of(update):
                aligned = not any(number % _ALIGNMENT for column, number in enumerate(row) if column != _STEP)
                copy = None if update.copy is None else update.copy.dtype
                rows[KernelKey(update.param.dtype, update.grad.dtype, copy, aligned)] += row
        for key, members in rows.items():
            table = self._tables[key]
            table.fill(members, lr.device)
            _launch(key, table, lr, scale, betas, eps, weight_decay)


def adamw_reference(
    update: ParamUpdate, lr: Tensor, scale: Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """The update in plain torch, in place: the equations at the top of this file."""
    wide = update.param.dtype
    grad, lr, step = update.grad.to(wide) * scale.to(wide), lr.to(wide), update.step.to(torch.float64)
    update.exp_avg.lerp_(grad, 1 - betas[0])
    update.exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    mean = update.exp_avg / (1 - betas[0] ** step).to(wide)
    root = (update.exp_avg_sq / (1 - betas[1] ** step).to(wide)).sqrt()
    update.param.sub_(lr * weight_decay * update.param + lr * mean / (root + eps))
    if update.copy is not None:
        update.copy.copy_(update.param)


def _row_of(update: ParamUpdate) -> tuple[int, ...]:
    """The table's row for an update; empty where there is nothing to update."""
    param, grad, exp_avg, exp_avg_sq, step, copy = update
    stride = param.stride()
    for tensor in (grad, exp_avg, exp_avg_sq, copy):
        assert tensor is None or tensor.stride() == stride, "the kernel reads all tensors in one order"
    addresses = [tensor.data_ptr() for tensor in (param, grad, exp_avg, exp_avg_sq)]
    n = param.numel()
    return (*addresses, 0 if copy is None else copy.data_ptr(), step.data_ptr(), n) if n else ()


class _Table:
    """The addresses of updates' tensors, in device memory.

    Attributes:
        addresses: int64 [updates * _COLUMNS].
        chunks: int32 [chunks, 2]: the row of the update, and the number of the chunk in it.
    """

    addresses: Tensor
    chunks: Tensor

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._sizes: list[int] = []
        self._staging: Tensor | None = None
        self._captured: list[Tensor] = []

    def fill(self, rows: list[int], device: torch.device) -> None:
        """Upload these rows, unless the device has them already."""
        sizes = rows[_COLUMNS - 1 :: _COLUMNS]
        if sizes != self._sizes:
            pairs = [(i, chunk) for i, n in enumerate(sizes) for chunk in range(-(-n // _CHUNK))]
            self.chunks = torch.tensor(pairs, dtype=torch.int32).to(device)
        if rows != self._rows:
            self.addresses = self._upload(torch.tensor(rows), device)
        self._rows, self._sizes = rows, sizes
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured += [self.chunks, self.addresses]  # every replay reads them

    def _upload(self, rows: Tensor, device: torch.device) -> Tensor:
        """The table on the device.

        [Note: addresses in a graph] During CUDA graph capture pinned memory cannot be allocated: the buffer of the
        previous eager call is used, and kept alive, because every replay reads it. A kernel copies it: torch's copy
        makes the host allocator query an event, which is illegal during capture.
        """
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._staging = torch.empty_like(rows, pin_memory=device.type == "cuda")
            return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)
        assert self._staging is not None, "capture one graph, then run an eager call before the next"
        staged, self._staging = self._staging, None
        self._captured.append(staged.copy_(rows))
        addresses = torch.empty_like(rows, device=device)
        _copy_kernel[(1,)](staged, addresses, len(rows), BLOCK=triton.next_power_of_2(len(rows)))
        return addresses


def _launch(
    key: KernelKey,
    table: _Table,
    lr: Tensor,
    scale: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    _adamw_kernel[(len(table.chunks),)](
        table.addresses,
        table.chunks,
        lr,
        scale,
        WIDE=_type_of(key.wide),
        GRAD=_type_of(key.grad),
        COPY=None if key.copy is None else _type_of(key.copy),
        ALIGNMENT=_ALIGNMENT if key.aligned else 1,
        BETA1=betas[0],
        BETA2=betas[1],
        LOG_BETA1=math.log(betas[0]) if betas[0] else -math.inf,
        LOG_BETA2=math.log(betas[1]) if betas[1] else -math.inf,
        EPS=eps,
        DECAY=weight_decay,
        COLUMNS=_COLUMNS,
        CHUNK=_CHUNK,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def _type_of(dtype: torch.dtype) -> Any:
    """Triton's dtype of this name."""
    return getattr(tl, str(dtype).removeprefix("torch."))


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _tensor_at(row, column: tl.constexpr, dtype: tl.constexpr, ALIGNMENT: tl.constexpr):  # type: ignore[no-untyped-def]
        return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(dtype)), ALIGNMENT)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _adamw_kernel(  # type: ignore[no-untyped-def]
        table,
        chunks,
        lr,
        scale,
        WIDE: tl.constexpr,
        GRAD: tl.constexpr,
        COPY: tl.constexpr,
        ALIGNMENT: tl.constexpr,
        BETA1: tl.constexpr,
        BETA2: tl.constexpr,
        LOG_BETA1: tl.constexpr,
        LOG_BETA2: tl.constexpr,
        EPS: tl.constexpr,
        DECAY: tl.constexpr,
        COLUMNS: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        chunk = chunks + tl.program_id(0) * 2
        row = table + tl.load(chunk) * COLUMNS
        param = _tensor_at(row, 0, WIDE, ALIGNMENT)
        grad = _tensor_at(row, 1, GRAD, ALIGNMENT)
        exp_avg = _tensor_at(row, 2, WIDE, ALIGNMENT)
        exp_avg_sq = _tensor_at(row, 3, WIDE, ALIGNMENT)
        t = tl.load(_tensor_at(row, 5, tl.float32, 1)).to(tl.float64)
        n = tl.multiple_of(tl.load(row + 6), ALIGNMENT)
        start = tl.load(chunk + 1).to(tl.int64) * CHUNK
        # fp64: at the first steps 1 - b^t cancels, in fp32 with a visible error; a program computes it once
        correction1 = (1 - tl.exp(t * LOG_BETA1)).to(WIDE)
        correction2 = (1 - tl.exp(t * LOG_BETA2)).to(WIDE)
        rate, factor = tl.load(lr).to(WIDE), tl.load(scale).to(WIDE)
        for offset in range(0, CHUNK, BLOCK):
            at = start + offset + tl.arange(0, BLOCK)
            inside = at < n
            p = tl.load(param + at, mask=inside)
            g = tl.load(grad + at, mask=inside).to(WIDE) * factor
            m = tl.load(exp_avg + at, mask=inside)
            v = tl.load(exp_avg_sq + at, mask=inside)
            m += (g - m) * (1 - BETA1)
            v = v * BETA2 + g * g * (1 - BETA2)
            p -= rate * DECAY * p + rate * (m / correction1) / (tl.sqrt(v / correction2) + EPS)
            tl.store(param + at, p, mask=inside)
            tl.store(exp_avg + at, m, mask=inside)
            tl.store(exp_avg_sq + at, v, mask=inside)
            if COPY is not None:
                tl.store(_tensor_at(row, 4, COPY, ALIGNMENT) + at, p.to(COPY), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _copy_kernel(source, target, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < n), mask=at < n)
