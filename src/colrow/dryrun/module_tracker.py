"""Attributes each operation and collective to a module, in forward and in backward.

In forward, hooks keep the stack of running modules. When a module returns, every autograd node that its call made and
that has no label yet gets the module's name, so that a node has the innermost module's; in backward the running node
gives the name. The hooks run outside those of the plan's styles: a gather before a module and a scatter after it belong
to that module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from colrow.torch_compat import current_autograd_node, tensors_in, tree_leaves

LOSS = "loss"
_KEY = "colrow_module"


class ModuleTracker:
    """Knows which module of `model` is running; `rename` maps its name to the one to report."""

    def __init__(self, model: nn.Module, rename: Callable[[str], str]) -> None:
        self._stack: list[str] = []
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            label = rename(name) if name else ""
            self._handles.append(module.register_forward_pre_hook(self._enter(label), prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._exit(label)))

    def current(self) -> str:
        """The fully qualified name of the running module; `loss` outside of the model, empty for the model itself."""
        node: Any = current_autograd_node()
        if node is not None:
            return str(node.metadata.get(_KEY, LOSS))
        return self._stack[-1] if self._stack else LOSS

    @staticmethod
    def in_backward() -> bool:
        """Whether a backward pass is running."""
        return current_autograd_node() is not None

    def innermost(self) -> str:
        """The module that was running when an exception left the model."""
        return self._stack[-1] if self._stack else LOSS

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._stack:
                _label_nodes((args, kwargs), self._stack[-1])
            self._stack.append(name)

        return hook

    def _exit(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            _label_nodes(output, name)
            self._stack.pop()

        return hook


def _label_nodes(values: Any, name: str) -> None:
    """Label every autograd node behind `values` that has no module yet."""
    todo = [leaf.grad_fn for leaf in tensors_of(values) if leaf.grad_fn is not None]
    while todo:
        node = todo.pop()
        metadata: Any = node.metadata
        if _KEY in metadata:
            continue
        metadata[_KEY] = name
        todo += [before for before, _ in node.next_functions if before is not None]


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors that a module gets or returns, those in an output object of transformers too."""
    return tensors_in([leaf.to_tuple() if hasattr(leaf, "to_tuple") else leaf for leaf in tree_leaves(values)])
