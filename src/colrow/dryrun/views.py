"""Records how a model's own code reshapes, splits and normalises tensors, to compare the sharded run with the other.

What is right for the whole tensor can be wrong for a shard and raise nothing: `view(B, T, n_heads, -1)` on a shard of
the heads shrinks the head dimension, `chunk(2, -1)` of a column shard of a fused weight cuts in the wrong place, and
`topk(2, -1)` over a rank's experts chooses among these alone. All are seen in the shapes of the two runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from colrow.dryrun.where import Where, frames

_RESHAPE = {Tensor.view: "view", Tensor.reshape: "reshape", torch.reshape: "reshape", Tensor.unflatten: "unflatten",
            torch.unflatten: "unflatten"}  # fmt: skip
_SPLIT = {
    f: f.__name__
    for f in (Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.unbind, torch.unbind, Tensor.tensor_split)
}
_ATTENTION = {F.scaled_dot_product_attention: "scaled_dot_product_attention"}
REDUCTIONS = ("softmax", "log_softmax", "logsumexp", "topk", "sort", "argsort", "argmax", "argmin", "cumsum", "mean",
              "var", "std")  # fmt: skip
"""What makes no sense of a part of the dimension that it runs over."""
_REDUCE = {getattr(owner, name): name for owner in (Tensor, torch) for name in REDUCTIONS}
_REDUCE |= {F.softmax: "softmax", F.log_softmax: "log_softmax"}
_WATCHED: dict[Any, str] = {**_RESHAPE, **_SPLIT, **_ATTENTION, **_REDUCE}
_TORCH = str(Path(torch.__file__).parent)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """One call of model code: what went in, what came out, and the dimension of a split.

    Attributes:
        shared: of an attention's keys and values, the shapes, and whether each is the same on all ranks.
    """

    op: str
    source: Shape
    result: tuple[Shape, ...]
    dim: int
    on_dtensor: bool
    packed: bool
    shared: tuple[tuple[Shape, bool], ...] = ()


class Views(TorchFunctionMode):
    """`calls[module]` lists the watched calls in the order in which the module's code made them."""

    def __init__(
        self,
        where: Where,
        packed: Callable[[Tensor], bool] = lambda _: False,
        varies: Callable[[Tensor], bool] = lambda _: False,
    ) -> None:
        super().__init__()
        self._packed, self._varies = packed, varies
        self.calls: dict[str, list[View]] = defaultdict(list)
        self._where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except Exception:
            if func in _ATTENTION:  # heads that do not go together may say why
                self._record(func, args, kwargs, None)
            raise
        if func in _WATCHED:
            self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        source: Any = args[0] if args else kwargs.get("input", kwargs.get("query"))
        if self._where.backward() or not _called_by_model() or not isinstance(source, Tensor):
            return
        name = _WATCHED[func]
        results = tuple(tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        dim = _dim(name, args, kwargs) % max(1, source.ndim)
        shared = self._shared(args, kwargs) if func in _ATTENTION else ()
        packed = self._packed(source)
        self.calls[self._where.module()].append(
            View(name, tuple(source.shape), results, dim, isinstance(source, DTensor), packed, shared)
        )

    def _shared(self, args: Any, kwargs: Any) -> tuple[tuple[Shape, bool], ...]:
        found = (args[i] if len(args) > i else kwargs.get(name) for i, name in ((1, "key"), (2, "value")))
        return tuple((tuple(x.shape), not self._varies(x)) for x in found if isinstance(x, Tensor))


def _dim(name: str, args: Any, kwargs: Any) -> int:
    """The dimension; of a reduction over several the last, over all the last too."""
    if name in ("view", "reshape", "scaled_dot_product_attention"):
        return 0
    position = 2 if name in ("chunk", "split", "tensor_split", "topk") else 1
    default = -1 if name in REDUCTIONS else 0
    dim = kwargs.get("dim", args[position] if len(args) > position else default)
    if isinstance(dim, (tuple, list)):
        dim = dim[-1] if dim else default
    return default if dim is None or isinstance(dim, bool) else int(dim)


def _called_by_model() -> bool:
    """False for the calls that torch.distributed makes for itself, be it through other files of torch."""
    for frame in frames():
        file = frame.f_code.co_filename
        if file == __file__:
            continue
        inside = file.removeprefix(_TORCH).replace("\\", "/")
        if inside.startswith("/distributed/"):
            return False
        if inside.startswith("/nn/") or not file.startswith(_TORCH):
            return True
    return True
