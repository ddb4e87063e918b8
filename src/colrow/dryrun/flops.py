"""Floating-point operations of matrix products, convolutions and attentions, from the shapes of a call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from torch.utils.flop_counter import flop_registry

from colrow.dryrun.module_tracker import ModuleTracker
from colrow.ops.linear_cross_entropy import chunk_gradients
from colrow.torch_compat import TorchDispatchMode, is_higher_order


def flops_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of one call of an operator: a multiplication and an addition count 2, what is no product counts 0."""
    name = func.name().partition(".")[0]
    if name in ("colrow::column_forward", "colrow::row_forward"):
        # [t, in] and weights [out, in]: columns see the gathered tokens, as their output has; rows have them in x
        tokens = out[0].shape[0] if name == "colrow::column_forward" else args[0].shape[0]
        weights = args[1] if isinstance(args[1], list) else [args[1]]
        return int(2 * tokens * sum(w.numel() for w in weights))
    if name.startswith("aten::_scaled_dot_product") and "backward" not in name:
        q, k, v = args[:3]  # [B, heads, T, E]
        return int(2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
    if name in ("aten::mkldnn_rnn_layer", "aten::_cudnn_rnn"):
        # [tokens, tokens, in]; matrices and vectors of one direction of a layer, or a list of them all
        matrices = (w for w in (args[1:5] if name == "aten::mkldnn_rnn_layer" else args[1]) if w.dim() == 2)
        return int(2 * args[0].shape[:2].numel() * sum(w.numel() for w in matrices))
    if name == "aten::_grouped_mm":
        return int(2 * out.numel() * args[0].shape[-1])
    formula = flop_registry.get(getattr(func, "overloadpacket", None))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def computes_gradients(frames: Iterator[FrameType]) -> bool:
    """Whether these frames are of a head and loss in one, which computes its gradients in forward."""
    return any(frame.f_code is chunk_gradients.__code__ for frame in frames)


class FlopCounter(TorchDispatchMode):
    """Counts, by module, what a model's forward computes."""

    def __init__(self, modules: ModuleTracker) -> None:
        super().__init__()
        self._modules = modules
        self.by_module: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not is_higher_order(func) and func.namespace != "prim":
            self.by_module[self._modules.current()] += flops_of(func, args, kwargs, out)
        return out
