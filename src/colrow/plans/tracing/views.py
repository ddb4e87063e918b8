"""Records how a model's own code reshapes and splits tensors, to compare the sharded run with the unsharded one.

A view that is right for the whole tensor can be wrong for a shard and raise nothing: `view(B, T, n_heads, -1)` on a
shard of the heads shrinks the head dimension, and `chunk(2, -1)` of a column shard of a fused weight cuts in the
wrong place. Both are seen in the shapes of the two runs.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from colrow.plans.tracing.where import Where

_RESHAPE = {Tensor.view: "view", Tensor.reshape: "reshape", torch.reshape: "reshape", Tensor.unflatten: "unflatten",
            torch.unflatten: "unflatten"}  # fmt: skip
_SPLIT = {
    f: f.__name__
    for f in (Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.unbind, torch.unbind, Tensor.tensor_split)
}
_ATTENTION = {F.scaled_dot_product_attention: "scaled_dot_product_attention"}
_WATCHED: dict[Any, str] = {**_RESHAPE, **_SPLIT, **_ATTENTION}
_LIBRARY = ("/torch/distributed/", "/torch/_tensor.py", "/torch/functional.py", "/torch/overrides.py")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """One call of model code: what went in, what came out, and the dimension of a split."""

    op: str
    source: Shape
    result: tuple[Shape, ...]
    dim: int
    on_dtensor: bool
    packed: bool


class Views(TorchFunctionMode):
    """`calls[module]` lists the watched calls in the order in which the module's code made them."""

    def __init__(self, where: Where, packed: Callable[[Tensor], bool] = lambda _: False) -> None:
        super().__init__()
        self._packed = packed
        self.calls: dict[str, list[View]] = defaultdict(list)
        self._where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = _WATCHED.get(func)
        if name is not None and not self._where.backward() and _called_by_model():
            source: Any = args[0] if args else kwargs.get("input", kwargs.get("query"))
            if isinstance(source, Tensor):
                results = tuple(tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
                dim = _split_dim(name, args, kwargs) % max(1, source.ndim)
                self.calls[self._where.module()].append(
                    View(name, tuple(source.shape), results, dim, isinstance(source, DTensor), self._packed(source))
                )
        return out


def _split_dim(name: str, args: Any, kwargs: Any) -> int:
    position = 1 if name in ("unbind", "unflatten") else 2
    if name in ("view", "reshape", "scaled_dot_product_attention"):
        return 0
    return int(kwargs.get("dim", args[position] if len(args) > position else 0))


def _called_by_model() -> bool:
    """False for the calls that torch.distributed makes for itself."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if not any(part in file for part in _LIBRARY[1:]):
            return _LIBRARY[0] not in file
        frame = frame.f_back
    return True
