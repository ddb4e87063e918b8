"""Records how a model's own code reshapes, splits and reduces tensors, to compare the sharded run with the unsharded.

What is right for a complete tensor can be wrong for a shard and raise nothing: `view(B, T, n_heads, -1)` on a shard of
the heads shrinks the head dimension, `chunk(2, -1)` of a column shard of a fused weight splits in the wrong place, and
`topk(2, -1)` over a rank's experts chooses among these alone. All of them show in the shapes of the two runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from colrow.dryrun.module_tracker import ModuleTracker
from colrow.torch_compat import frames, is_transformed, path_in_torch, tensors_in

_RESHAPE = {Tensor.view: "view", Tensor.reshape: "reshape", torch.reshape: "reshape", Tensor.unflatten: "unflatten",
            torch.unflatten: "unflatten"}  # fmt: skip
_SPLIT = {
    f: f.__name__
    for f in (Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.unbind, torch.unbind, Tensor.tensor_split)
}
_ATTENTION = {F.scaled_dot_product_attention: "scaled_dot_product_attention"}
REDUCTIONS = ("softmax", "log_softmax", "logsumexp", "topk", "sort", "argsort", "argmax", "argmin", "cumsum", "mean",
              "var", "std")  # fmt: skip
"""Wrong on a shard of the dimension that they run over."""
_REDUCE = {getattr(owner, name): name for owner in (Tensor, torch) for name in REDUCTIONS}
_REDUCE |= {F.softmax: "softmax", F.log_softmax: "log_softmax"}
_WATCHED: dict[Any, str] = {**_RESHAPE, **_SPLIT, **_ATTENTION, **_REDUCE}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RecordedCall:
    """One call by model code: local shapes of the first input and of the results, and the dim that it runs over.

    Attributes:
        dim: None of a reduction over several dims, or over all.
        packed: the input comes from a fused weight of which each segment was split on its own.
        keys_and_values: of an attention, the shapes of keys and values, and whether each is the same on all ranks.
    """

    op: str
    source: Shape
    result: tuple[Shape, ...]
    dim: int | None
    on_dtensor: bool
    packed: bool
    keys_and_values: tuple[tuple[Shape, bool], ...] = ()


class CallRecorder(TorchFunctionMode):
    """`calls[module]` lists the watched calls in the order in which the module's code made them."""

    def __init__(
        self,
        modules: ModuleTracker,
        packed: Callable[[Tensor], bool] = lambda _: False,
        varies: Callable[[Tensor], bool] = lambda _: False,
    ) -> None:
        super().__init__()
        self._packed, self._varies = packed, varies
        self.calls: dict[str, list[RecordedCall]] = defaultdict(list)
        self._modules = modules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except Exception:
            if func in _ATTENTION:  # the shapes of heads that do not fit may explain the exception
                self._record(func, args, kwargs, None)
            raise
        if func in _WATCHED:
            self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        source: Any = args[0] if args else kwargs.get("input", kwargs.get("query"))
        if self._modules.in_backward() or not _called_by_model() or not isinstance(source, Tensor):
            return
        if is_transformed(source):  # its shapes lack the mapped dims; `lockstep` sees the operators themselves
            return
        name = _WATCHED[func]
        results = tuple(tuple(result.shape) for result in tensors_in(out))
        given = _dim(name, args, kwargs)
        dim = None if given is None else given % max(1, source.ndim)
        keys_and_values = self._keys_and_values(args, kwargs) if func in _ATTENTION else ()
        packed = self._packed(source)
        self.calls[self._modules.current()].append(
            RecordedCall(name, tuple(source.shape), results, dim, isinstance(source, DTensor), packed, keys_and_values)
        )

    def _keys_and_values(self, args: Any, kwargs: Any) -> tuple[tuple[Shape, bool], ...]:
        found = (args[i] if len(args) > i else kwargs.get(name) for i, name in ((1, "key"), (2, "value")))
        return tuple((tuple(x.shape), not self._varies(x)) for x in found if isinstance(x, Tensor))


def _dim(name: str, args: Any, kwargs: Any) -> int | None:
    """The dim that the call runs over; None of a reduction over several dims, or over all."""
    if name in ("view", "reshape", "scaled_dot_product_attention"):
        return 0
    position = 2 if name in ("chunk", "split", "tensor_split", "topk") else 1
    default = -1 if name in ("topk", "sort", "argsort") else None if name in REDUCTIONS else 0
    dim = kwargs.get("dim", args[position] if len(args) > position else default)
    if isinstance(dim, (tuple, list)):
        dim = dim[0] if len(dim) == 1 else None
    return default if dim is None or isinstance(dim, bool) else int(dim)


def _called_by_model() -> bool:
    """False for calls that torch.distributed makes itself, directly or through other files of torch."""
    for frame in frames():
        inside = path_in_torch(frame)
        if frame.f_code.co_filename == __file__:
            continue
        if inside is not None and inside.startswith("/distributed/"):
            return False
        if inside is None or inside.startswith("/nn/"):
            return True
    return True
