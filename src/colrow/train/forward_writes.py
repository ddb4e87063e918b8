"""Parameters that a model's forward writes, which is lost where forward gets copies of them: refused by name.

Data parallelism and compute copies give forward gathered or cast tensors. What code writes into these, `max_norm` of an
embedding, a moving average kept as a parameter, weights that it clips, is dropped with them, and no rank's optimizer
sees it. Each module's first forward in a run is looked at: the bits of its parameters before and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from colrow.errors import ConfigError
from colrow.sharding.layout import unwrapped_name, waited_local
from colrow.train.fingerprint import fingerprints


def refuse_forward_writes(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Let the first forward of each module raise a ConfigError where it writes a parameter.

    Args:
        model: or a pipeline stage, wrapped for training and with its copies.
        blocks: each is looked at as one, for compiled code runs no hooks inside them.
    """
    names = {module: name for name, module in model.named_modules()}
    inside = {part for block in blocks for part in block.modules()}
    for module in [*blocks, *(module for module in names if module not in inside)]:
        owners = list(module.modules()) if module in inside else [module]
        params = [
            (names[owner], owner, leaf)
            for owner in owners
            for leaf, param in owner._parameters.items()
            if param is not None
        ]
        if params:
            _FirstForward(module, params)


class _FirstForward:
    """Hooks that are there until the module has run once.

    Args:
        params: of the module: the owner's name, the owner, and the parameter's name in it.
    """

    def __init__(self, module: nn.Module, params: Sequence[tuple[str, nn.Module, str]]) -> None:
        self._params = params
        # Between FSDP2's hooks, of which the first has gathered the parameters, and the last frees them.
        self._handles = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, prepend=True),
        ]

    def _before(self, module: nn.Module, args: Any) -> None:
        self._hashes = fingerprints(self._values())  # no copies: gathered parameters may fill the memory

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        for handle in self._handles:
            handle.remove()
        changed = (fingerprints(self._values()) != self._hashes).tolist()
        for (owner_name, _, leaf), differs in zip(self._params, changed, strict=True):
            if differs:
                name = unwrapped_name(f"{owner_name}.{leaf}".lstrip("."))
                raise ConfigError(
                    f"forward writes the parameter {name}, which is lost: on this mesh forward gets a copy of it. Keep "
                    "what forward writes in a buffer (register_buffer), and use no max_norm of an embedding"
                )

    def _values(self) -> list[Tensor]:
        held = (owner._parameters[leaf] for _, owner, leaf in self._params)
        return [waited_local(param) for param in held if param is not None]
