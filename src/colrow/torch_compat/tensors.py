"""Private interfaces of tensors, autograd, compiled graphs and CUDA streams."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colrow.torch_compat.names import private


class CompilableMode(TorchDispatchMode):
    """A dispatch mode in which torch.compile works: it sees the operators of a compiled graph, not the compiler's."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # torch passes over such modes where it looks for a user's

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else dynamo leaves every frame that runs under the mode uncompiled, without a word


_NO_TREES = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) in (tuple, list, dict):  # torch's own walk takes far longer, and every operator is asked
        entries = tree.values() if type(tree) is dict else tree
        return [found for entry in entries if type(entry) not in _NO_TREES for found in tensors_in(entry)]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def own_results(out: Any) -> Any:
    """An operator's results, each a tensor of its own: the fake kernel of an LSTM's backward returns one tensor as the
    gradients of both biases, where the real kernel makes two."""
    if type(out) is not tuple:
        return out
    first = {id(x): i for i, x in reversed(list(enumerate(out)))}
    return tuple(x.clone() if isinstance(x, Tensor) and first[id(x)] != i else x for i, x in enumerate(out))


def foreach(name: str, *args: Any, **kwargs: Any) -> Any:
    """`torch._foreach_{name}`: one launch for a list of tensors. Public lists of tensors exist for no other form."""
    return private(f"torch:_foreach_{name}", "to update lists of tensors in one launch")(*args, **kwargs)


def version(tensor: Tensor) -> int:
    """How often the tensor was written in place, by torch's count. Fused optimizers do not count."""
    return int(tensor._version)


def parameter_hooks(param: Tensor) -> tuple[dict[int, Any], dict[int, Any]]:
    """The parameter's own tables of `register_hook` and of `register_post_accumulate_grad_hook`."""
    return getattr(param, "_backward_hooks", None) or {}, getattr(param, "_post_accumulate_grad_hooks", None) or {}


def current_autograd_node() -> Any:
    """The backward node that runs on this thread; None in a forward."""
    return private("torch._C:_current_autograd_node", "to attribute gradients to modules")()


def forward_number(node: Any = None) -> int:
    """The number by which autograd orders backward nodes; without a node, of the one that this thread made last."""
    last = private("torch.autograd:_get_sequence_nr", "to attribute gradients to source lines")
    return int(node._sequence_nr()) if node is not None else int(last()) - 1  # torch's is that of the next node


def is_higher_order(func: Any) -> bool:
    """Whether a dispatched function is a higher-order operator, whose arguments are graphs."""
    return isinstance(func, private("torch._ops:HigherOrderOperator", "to pass over operators that hold graphs"))


def is_transformed(tensor: Tensor) -> bool:
    """Whether `torch.vmap` or `torch.func.grad` holds the tensor: it has no memory, and modes see what it wraps."""
    wraps = private("torch._C._functorch:is_functorch_wrapped_tensor", "to follow code under torch.vmap")
    return bool(wraps(tensor))


def apply_to_tensors(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer of the model, in place: what `Module.to` is built on."""
    model._apply(change)


def scaled_product(*args: Any, **kwargs: Any) -> Tensor:
    """A matmul of 8-bit operands with their scales (`torch._scaled_mm`)."""
    y: Tensor = private("torch:_scaled_mm", "for 8-bit matmuls")(*args, **kwargs)
    return y


def block_scaled_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out: Tensor) -> None:
    """The same with a scale for each 1 x 128 of a and each 128 x 128 of b: `torch.nn.functional.scaled_mm`, which takes
    no `out`."""
    kinds: Any = private("torch.nn.functional:ScalingType", "for 8-bit matmuls")
    multiply = private("torch:ops.aten._scaled_mm_v2.out", "for 8-bit matmuls")
    of_a, of_b = kinds.BlockWise1x128.value, kinds.BlockWise128x128.value
    multiply(a, b, [scale_a], [of_a], [], [scale_b], [of_b], [], None, out.dtype, out=out)


def attention_backend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, grouped: bool) -> int:
    """The number of the SDPBackend that attention of these tensors runs."""
    choose = private("torch:_fused_sdp_choice", "to say which attention kernel runs")
    return int(choose(q, k, v, None, 0.0, causal, enable_gqa=grouped))


def _three_products(q: Any, k: Any, v: Any, w_q: Any, w_k: Any, w_v: Any, *biases: Any) -> tuple[Any, ...]:
    given = zip((q, k, v), (w_q, w_k, w_v), biases or (None, None, None), strict=True)
    return tuple(functional.linear(x, weight, bias) for x, weight, bias in given)


def open_attention() -> Callable[..., Any]:
    """`F.multi_head_attention_forward` as code like any other: a function mode sees the calls that it makes.

    torch hands the function to a mode as one call, and hands it over once more when the mode runs it in itself. Its
    products of query, key and value assert that weights are square, which a rank's are not.
    """
    function: Any = functional.multi_head_attention_forward
    names = dict(vars(functional))
    private("torch.nn.functional:has_torch_function", "to follow the code of nn.MultiheadAttention")
    names["has_torch_function"] = lambda _: False
    names["_in_projection"] = _three_products
    # the same code with other globals: nothing of torch itself changes
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def compiled_graph_count() -> int:
    """How many graphs torch.compile has made in this process."""
    return int(private("torch._dynamo.utils:counters", "to say whether blocks were compiled")["stats"]["unique_graphs"])


def inductor() -> Callable[..., Any]:
    """(graph, inputs) -> compiled function: torch.compile's default backend."""
    backend: Callable[..., Any] = private("torch._inductor.compile_fx:compile_fx", "to rewrite a graph before inductor")
    return backend


def raw_stream(device_index: int) -> int:
    """The handle of the device's current CUDA stream, for the driver's own functions."""
    return int(private("torch._C:_cuda_getCurrentRawStream", "to enqueue copies between GPUs")(device_index))


def symmetric_memory() -> Any:
    """The module by which ranks of one host share GPU memory: `empty`, `rendezvous`."""
    return importlib.import_module("torch.distributed._symmetric_memory")
