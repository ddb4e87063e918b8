"""Code that asks for fp32, run in fp64: `x.float()`, `x.to(torch.float32)`, `torch.zeros(..., dtype=torch.float32)`.

A model whose inputs pass such a cast does not run with weights in fp64. In fp32 a gradient that is zero by mathematics,
such as that of a bias before a batch norm, is rounding noise of which nothing can be said.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from colrow.torch_compat import TorchDispatchMode

_CASTS = (Tensor.to, Tensor.type)


class DoubleCasts(TorchFunctionMode):
    """Within, fp32 means fp64 where the code of a forward asks for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if func in _CASTS:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class Rounding(TorchDispatchMode):
    """Sees whether fp64 values are rounded to fp32 or less."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            self.seen = self.seen or (out.is_floating_point() and out.dtype != torch.float64)
        return out
