"""A model's buffers as they were, to be put back after a forward that must leave no trace."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class BufferSnapshot:
    """Copies of all buffers of `modules`, taken now."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = [part for module in modules for part in module.modules()]
        self._buffers = [(part, dict(part._buffers)) for part in parts]
        self._values = [(b, b.detach().clone()) for _, named in self._buffers for b in named.values() if b is not None]

    @torch.no_grad()
    def restore(self) -> None:
        """Give every buffer its value back, and its place: a forward may have put another tensor there."""
        for part, named in self._buffers:
            part._buffers.clear()
            part._buffers.update(named)
        for buffer, value in self._values:
            buffer.copy_(value)
