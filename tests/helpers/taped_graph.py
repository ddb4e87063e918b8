"""A stand-in for CUDA graphs on CPUs: the operators of a function are recorded, and run again without its Python.

As in a CUDA graph, a replay reads and writes the tensors of the capture, and knows nothing of Python's state: hooks do
not run, and numbers are those of the capture. Other than there, the capture computes too, nothing is freed, and there
is one stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colrow.train import setup, step
from colrow.train.cuda_graph import GraphedFunction


class Tape(TorchDispatchMode):
    """Records what runs within; collectives too."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self._has_run = True  # by the capture, which computes here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it does to local tensors comes here too
        out = func(*args, **(kwargs or {}))
        if not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs, out))):  # DTensor asks for shapes
            self._calls.append((func, args, kwargs or {}, tree_leaves(out)))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        if self._has_run:
            self._has_run = False
            return
        messages: list[Any] = []  # a rank sends and receives at once
        for func, args, kwargs, before in self._calls:
            sends = func.name() in ("c10d::send", "c10d::recv_")
            if not sends:
                _wait(messages)
            again = tree_leaves(func(*args, **kwargs))
            if sends or func.namespace == "c10d":
                messages += [x for x in again if isinstance(x, torch.ScriptObject)]
            if not sends:
                _wait(messages)
            for old, new in zip(before, again, strict=True):
                if isinstance(old, Tensor):
                    if func.namespace == "_c10d_functional":
                        new = torch.ops._c10d_functional.wait_tensor(new)
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        _wait(messages)

    def reset(self) -> None:
        self._calls.clear()


def _wait(works: list[Any]) -> None:
    for work in works:
        torch._C._distributed_c10d.Work.unbox(work).wait()  # type: ignore[attr-defined]
    works.clear()


class TapedFunction(GraphedFunction):
    """Counts its captures and replays."""

    def __init__(self, *args: Any, **options: Any) -> None:
        with mock.patch.object(torch.cuda, "Stream"), mock.patch.object(torch.cuda, "MemPool"):
            super().__init__(*args, **options)
        self._on_stream = self.lent_memory = nullcontext  # type: ignore[method-assign, assignment]
        self._watched = lambda args: self._run(*args)  # type: ignore[method-assign]

    def _recorded(self) -> Any:
        with Tape() as tape:
            return tape, self._run(*self._static_args)

    @property
    def captures(self) -> int:
        return len(self._graphs)


@contextmanager
def taped_graphs() -> Iterator[None]:
    """Within, `train.cuda_graph` works on CPUs."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(step, "GraphedFunction", TapedFunction))
        stack.enter_context(mock.patch.object(setup, "check_cuda_graph"))
        yield
