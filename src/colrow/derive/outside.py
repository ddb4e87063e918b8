"""Which parameters are read by the code of other modules than their own.

An exported graph shows such a read only where its value is used. Where it is not, the model runs it all the same,
and a style that leaves a DTensor in the module makes it fail beside plain tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def watching_reads(model: nn.Module, found: set[str]) -> Iterator[None]:
    """Within, `found` gets the first names of parameters that are read while none of their modules runs.

    What stands in the parameters' places during an export counts as they do.
    """
    watch = _Watch(model, found)
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(watch.enter, name or ".")))
        handles.append(module.register_forward_hook(watch.leave, always_call=True))
    try:
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Sees each tensor that a function of torch takes, and which modules run then."""

    def __init__(self, model: nn.Module, found: set[str]) -> None:
        super().__init__()
        self.found = found
        self._model = model
        self._running: list[str] = []
        self._owners: dict[int, set[str]] = {}
        self._first_name: dict[int, str] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._running:
            for value in (*args, *(kwargs or {}).values()):
                # "" owns the model's own parameters: the model runs while anything does
                if isinstance(value, Tensor) and not self._owners.get(id(value), {""}) & {*self._running, ""}:
                    self.found.add(self._first_name[id(value)])
        return function(*args, **(kwargs or {}))

    def enter(self, name: str, *_: Any) -> None:
        if not self._running:  # an export has put other tensors in the parameters' places since the last forward
            self._read_owners()
        self._running.append(name)

    def leave(self, *_: Any) -> None:
        self._running.pop()

    def _read_owners(self) -> None:
        owners = defaultdict[int, set[str]](set)
        self._first_name = {}
        for full, param in self._model.named_parameters(remove_duplicate=False):
            owners[id(param)].add(full.rpartition(".")[0])
            self._first_name.setdefault(id(param), full)
        self._owners = dict(owners)
