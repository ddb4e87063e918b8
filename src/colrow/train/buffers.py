"""A model's buffers: put back after a forward that must leave no trace, and combined where data ranks wrote them.

[Note: written buffers]
A buffer counts as written when its bits differ from those before the step; code that writes through `.data` is seen
too. Where data ranks' values of a buffer that one of them wrote differ, it becomes:

    floating point   the mean over the data ranks that wrote it in this step
    integer, bool    the maximum over them

A rank's own micro-batches write in order, as in one process. So a checkpoint, an evaluation and the next step see the
same buffers on each data rank. A stored buffer must have its shape from the start: a checkpoint that holds one which
forward has made, or made larger, could not be loaded. Buffers that are not stored (`persistent=False`) are each rank's
own. Ranks of a tp group read the same batch: a buffer that depends on a rank's shard of it is an error that check finds
(CR415).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colrow.errors import ConfigError
from colrow.sharding.layout import local_tensor, unwrapped_name


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


class WrittenBuffers:
    """The persistent buffers of `modules`, compared and combined over the data axes.

    Args:
        modules: the model, or this rank's pipeline stages, on their final device.
        groups: those of the data axes that have several ranks (`MeshAxes.data_groups`).
    """

    def __init__(self, modules: Sequence[nn.Module], groups: Sequence[dist.ProcessGroup]) -> None:
        self._groups = groups
        owners = [(owner, name) for module in modules for owner in module.modules() for name in _persistent(owner)]
        self._owners = owners if groups else []
        self._modules, self._shapes = modules, _stored_shapes(modules)
        self._looked = False  # whether a step has shown that forward leaves the shapes alone
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Before a step's first forward."""
        self._before = [_bits(buffer).clone() for buffer in self._buffers()]

    @torch.no_grad()
    def combine(self) -> None:
        """After a step's last backward. Collective over the data axes; waits for the device if there are buffers.

        Raises:
            ConfigError: in the first step, where forward has made a stored buffer, or changed its shape.
        """
        if not self._looked:
            self._require_shapes()
        if not self._owners:
            return
        buffers = self._buffers()
        wrote = torch.stack([(_bits(b) != old).any() for b, old in zip(buffers, self._before, strict=True)]).int()
        writers = wrote.clone()  # how many data ranks wrote each buffer; every rank needs the same answer
        for group in self._groups:
            dist.all_reduce(writers, group=group)
        by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor, int]]] = defaultdict(list)
        for buffer, mine, count in zip(buffers, wrote, writers.tolist(), strict=True):
            if count:
                by_dtype[buffer.dtype].append((buffer, mine, count))
        for dtype, items in by_dtype.items():
            combined = self._combined(dtype, items).split([buffer.numel() for buffer, _, _ in items])
            for (buffer, _, _), value in zip(items, combined, strict=True):
                buffer.copy_(value.view_as(buffer))

    def _require_shapes(self) -> None:
        self._looked = True
        for name, shape in _stored_shapes(self._modules).items():
            if (before := self._shapes.get(name)) != shape:
                raise ConfigError(
                    f"forward gives the buffer {name} the shape {list(shape)}, and the model was built with "
                    f"{'none' if before is None else list(before)}: a checkpoint that holds it could not be loaded. "
                    "Register it with this shape when the model is built, or with persistent=False"
                )

    def _combined(self, dtype: torch.dtype, items: Sequence[tuple[Tensor, Tensor, int]]) -> Tensor:
        """The values of all `items` in one tensor: (buffer, 1 where this rank wrote it, how many ranks did)."""
        # the mean of bf16 buffers is taken in fp32
        exact = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.int64
        values = torch.cat([buffer.reshape(-1).to(exact) for buffer, _, _ in items])
        sizes = torch.tensor([buffer.numel() for buffer, _, _ in items], device=values.device)
        mine = torch.stack([wrote for _, wrote, _ in items]).repeat_interleave(sizes).bool()
        counts = torch.tensor([count for _, _, count in items], device=values.device).repeat_interleave(sizes)
        # Both extremes by one collective: min x = -max(-x). The least integer has no negative: take the next.
        least = torch.finfo(exact).min if exact.is_floating_point else torch.iinfo(exact).min + 1
        extremes = torch.cat([values.where(mine, least), (-values).where(mine, least)])
        for group in self._groups:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        largest, smallest = extremes[: len(values)], -extremes[len(values) :]
        if not exact.is_floating_point:
            return largest.to(dtype)
        total = values.where(mine, 0)
        for group in self._groups:
            dist.all_reduce(total, group=group)
        return largest.where(largest == smallest, total / counts)  # the mean of three equal values may round

    def _buffers(self) -> list[Tensor]:
        found = [local_tensor(owner.get_buffer(name)) for owner, name in self._owners]
        return [torch.view_as_real(buffer) if buffer.is_complex() else buffer for buffer in found]


def _stored_shapes(modules: Iterable[nn.Module]) -> dict[str, torch.Size]:
    return {
        unwrapped_name(f"{owner_name}.{name}".lstrip(".")): owner.get_buffer(name).shape
        for module in modules
        for owner_name, owner in module.named_modules()
        for name in _persistent(owner)
    }


def _persistent(module: nn.Module) -> list[str]:
    left_out = module._non_persistent_buffers_set
    return [name for name, buffer in module._buffers.items() if buffer is not None and name not in left_out]


def _bits(buffer: Tensor) -> Tensor:
    """The buffer's bytes: NaN equals itself, and -0.0 differs from 0.0."""
    return buffer.detach().contiguous().reshape(-1).view(torch.uint8)
