"""Which parameters are read by the code of other modules than their own.

An exported graph shows such a read only where its value is used. Where it is not, the model runs it all the same,
and a style that leaves a DTensor in the module makes it fail beside plain tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def watching_reads(model: nn.Module) -> Iterator[set[str]]:
    """Within, fills with the first names of parameters that are read while none of their modules runs.

    What stands in the parameters' places during an export counts as they do.
    """
    found: set[str] = set()
    running: list[str] = []
    owners: dict[int, set[str]] = {}
    first: dict[int, str] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if running:
                for value in (*args, *(kwargs or {}).values()):
                    if isinstance(value, Tensor) and not owners.get(id(value), {""}) & {*running, ""}:
                        found.add(first[id(value)])
            return function(*args, **(kwargs or {}))

    def entering(name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if not running:
                owners.clear()
                first.clear()
                owned = defaultdict(set)
                for full, param in model.named_parameters(remove_duplicate=False):
                    owned[id(param)].add(full.rpartition(".")[0])
                    first.setdefault(id(param), full)
                owners.update(owned)
            running.append(name)

        return enter

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(entering(name or ".")))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with Watch():
            yield found
    finally:
        for handle in handles:
            handle.remove()
