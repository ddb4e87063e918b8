"""What one rank computes and sends in a part of a step, counted from its operators on fake tensors.

    products     FLOPs of matmuls, with the sizes of each
    attention    FLOPs of the causal half, in those of heads of 128 numbers
    memory       bytes that pointwise operators and reductions read and write
    collectives  bytes of the larger side, by kind

A compiler fuses a chain of pointwise operators: it reads what other operators wrote, and writes what other operators
read. `fused_bytes` counts that, `bytes` every operator's own traffic. Operators on complex numbers stay alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from colrow.ops.parallel_linear import OPERATORS, traffic
from colrow.sharding.operators import operator, operator_name
from colrow.torch_compat import group_named

SHORT_ATTENTION = 800
"""Keys more than the causal half, for which attention's time stands: 540 to 880 on H100 from 1,024 to 32,768 tokens,
1,365 on H200 from 8,192 to 32,768."""
NARROW_HEADS = 0.33  # a head of 64 numbers takes 1.25 times as long a FLOP as one of 128, on both
GROUPED = 1.33  # experts' matmuls take longer than one matmul of their FLOPs: 32 experts on H100 and on H200

Product = tuple[int, int, int]
"""(tokens, width in, width out) of a matmul."""


@dataclass
class Work:
    """What one segment, or a step, computes and sends.

    Attributes:
        products: FLOPs by the matmul's sizes.
        collectives: (kind, bytes of the larger side) to their number.
        operators: number of operators that launch something, views left out.
    """

    products: Counter[Product] = field(default_factory=Counter)
    attention_forward: float = 0.0
    attention_backward: float = 0.0
    bytes: float = 0.0
    fused_bytes: float = 0.0
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)
    operators: int = 0
    kernels: int = 0

    def add(self, other: Work, times: int = 1) -> None:
        """Add the other's numbers, `times` over."""
        for product, flops in other.products.items():
            self.products[product] += int(flops * times)
        for collective, count in other.collectives.items():
            self.collectives[collective] += count * times
        for name in ("attention_forward", "attention_backward", "bytes", "fused_bytes", "operators", "kernels"):
            setattr(self, name, getattr(self, name) + getattr(other, name) * times)


class WorkCounter:
    """Adds each operator to the work of the running segment."""

    def __init__(self) -> None:
        self._work = Work()
        self._fused: dict[int, bool] = {}
        """Storages that pointwise operators wrote, and whether the write is counted already."""
        self._read: set[int] = set()

    def begin(self, work: Work) -> None:
        self._work = work
        self._read.clear()  # no kernel is fused over the ends of a block

    def forget(self, key: int) -> None:
        """This storage is freed: the next one at its address is another tensor."""
        self._fused.pop(key, None)
        self._read.discard(key)

    def add(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: list[Tensor], outputs: list[Tensor]
    ) -> bool:
        """Returns whether it is a pointwise operator or a reduction, which a compiler fuses with its neighbours; or a
        view, which launches nothing."""
        keys = {x.untyped_storage()._cdata for x in inputs}
        made = [x for x in outputs if x.untyped_storage()._cdata not in keys]
        namespace, name = func.namespace, operator_name(func)
        work = self._work
        collectives = self._collectives(namespace, name, args, inputs, outputs)
        work.collectives.update(collectives)
        # a view: its result lies in an input's memory, and nothing is launched
        if not made and not collectives and not func._schema.is_mutable:
            return True
        flops = _flops(func, name, args, kwargs, inputs, outputs)
        # A matmul or a collective is a kernel of its own: what was fused so far is written before it.
        if flops or collectives:
            for kind, sizes, number in flops:
                if kind == "product":
                    work.products[sizes] += int(number)
                else:
                    setattr(work, kind, getattr(work, kind) + number)
            self._leave_fusion(inputs)
            work.kernels += max(1, len(flops))
            work.operators += 1
            return False
        if any(x.is_complex() for x in (*inputs, *outputs)):  # inductor makes no kernels of complex numbers
            work.bytes += (alone := sum(map(_nbytes, inputs)) + sum(map(_nbytes, outputs)))
            work.fused_bytes += alone
            self._leave_fusion(inputs)
            work.kernels += 1
            work.operators += 1
            return False
        if namespace in ("aten", "prims", "colrow") and name not in _WITHOUT_TRAFFIC:
            self._pointwise(inputs, made or outputs)
        work.operators += 1
        return True

    def _pointwise(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        work = self._work
        work.bytes += sum(map(_nbytes, inputs)) + sum(map(_nbytes, outputs))
        # Eager each operator reads and writes all of its tensors. Fused, a tensor is read once, and what stays inside a
        # kernel is neither written nor read: see `_leave_fusion`.
        for x in inputs:
            key = x.untyped_storage()._cdata
            if key not in self._fused and key not in self._read:
                self._read.add(key)
                work.fused_bytes += _nbytes(x)
        for x in outputs:
            self._fused[x.untyped_storage()._cdata] = False

    def _leave_fusion(self, inputs: list[Tensor]) -> None:
        """These tensors are read by a kernel of another kind, so a fused one has written them."""
        for x in inputs:
            key = x.untyped_storage()._cdata
            if self._fused.get(key) is False:
                self._fused[key] = True
                self._work.fused_bytes += _nbytes(x)
                self._work.kernels += 1

    @staticmethod
    def _collectives(
        namespace: str, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> list[tuple[str, int]]:
        if namespace == "colrow":
            return [(kind, nbytes) for kind, _, nbytes in traffic(name, args, outputs)]
        if namespace in ("_c10d_functional", "_c10d_functional_autograd", "_dtensor", "c10d"):
            kind = operator(name).collective
            tensors = [*inputs, *outputs]
            return [(kind, max(map(_nbytes, tensors)))] if kind and tensors else []
        return []


_WITHOUT_TRAFFIC = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach"}


def _flops(
    func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
) -> list[tuple[str, Product, float]]:
    """(kind, sizes, FLOPs) of each matmul or attention in the operator."""
    if name.startswith("_scaled_dot_product"):
        backward = name.endswith("backward")
        q, k = inputs[1:3] if backward else inputs[:2]
        B, H, Q, E = q.shape
        causal = True in [a for a in (*args, *kwargs.values()) if isinstance(a, bool)]
        # kernels are slower for short sequences and for narrow heads
        share = (1 + SHORT_ATTENTION / Q) / 2 if causal else 1.0
        forward = 4.0 * B * H * Q * k.shape[2] * E * share * max(1.0, (128 / E) ** NARROW_HEADS)
        return [
            ("attention_backward" if backward else "attention_forward", (0, 0, 0), forward * (2.5 if backward else 1))
        ]
    if func.namespace == "colrow" and f"colrow::{name}" in OPERATORS:
        return _own_products(name, args, outputs)
    if name in ("_grouped_mm", "grouped_mm_fallback"):
        a, b = inputs[:2]  # flattened tokens of all groups, or one matrix a group
        rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
        groups = b.shape[0] if a.dim() == b.dim() == 3 else 1
        return [("product", (rows, inner, columns), 2.0 * GROUPED * groups * rows * inner * columns)]
    packet = getattr(func, "overloadpacket", None)
    if packet in flop_registry and inputs and outputs:
        flops = float(flop_registry[packet](*args, **kwargs, out_val=outputs[0]))
        return [("product", _sizes(inputs), flops)] if flops else []
    return []


def _sizes(inputs: list[Tensor]) -> Product:
    a, b = [x for x in inputs if x.dim() >= 2][-2:]
    return a.shape[-2], a.shape[-1], b.shape[-1]


def _own_products(name: str, args: Any, outputs: list[Tensor]) -> list[tuple[str, Product, float]]:
    """The matmuls inside an operator of `ops.parallel_linear`."""

    def product(rows: int, inner: int, columns: int) -> tuple[str, Product, float]:
        return "product", (rows, inner, columns), 2.0 * rows * inner * columns

    match name:
        case "column_forward":
            y = outputs[0]
            return [product(y.shape[0], args[0].shape[1], y.shape[1])]
        case "column_backward":
            dy, _, weights = args[:3]
            T, F, D = dy.shape[0], dy.shape[1], weights[0].shape[1]
            needed = [
                product(T, F, D) if outputs[0].numel() else None,
                product(F, T, D) if outputs[1].numel() else None,
            ]
            return [entry for entry in needed if entry]
        case "row_forward":
            x, w = args[:2]
            return [product(x.shape[0], w.shape[1], w.shape[0])]
        case "row_backward":
            dy, _, w, group = args[:4]
            T = dy.shape[0] * group_named(group).size()
            return [product(T, w.shape[0], w.shape[1]), product(w.shape[0], T, w.shape[1])]
    return []


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
