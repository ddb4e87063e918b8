"""Buffers as a module that runs on its shards sees them: the rows that go with its features.

A buffer stays a complete, equal tensor on every rank: checkpoints, exports and data ranks know no other kind. The
module's forward reads the rank's rows of it. Where forward wrote into these (a batch norm its running statistics), the
rows of all ranks are gathered into the buffer: one small all-gather a forward in training.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.sharding.local_view import subclass_in_its_place
from colrow.styles.rank_tensors import rank_table
from colrow.styles.shards import ShardSpec
from colrow.torch_compat import all_gather, version

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""What they write into their running statistics, torch does not count."""
_SEEN = "_colrow_seen_buffers"  # module attribute: {buffer name: _Seen}, of the last forward


@dataclass(frozen=True)
class _Seen:
    """This rank's rows of a buffer, and how often they had been written when forward began."""

    rows: Tensor
    version: int


@dataclass(frozen=True)
class _Rows:
    """Which rows of a buffer's `dim` a rank uses, and where each row of the buffer stands among those of all ranks."""

    dim: int
    own: Tensor
    places: Tensor | None

    @classmethod
    def of(cls, spec: ShardSpec, mesh: DeviceMesh) -> _Rows:
        assert spec.dim is not None
        tp = mesh.size()
        rows = [spec.rows(tp, rank) for rank in range(tp)]
        order = places_of_rows([row for each in rows for row in each])
        places = None if order is None else torch.tensor(order, device=mesh.device_type)
        return cls(spec.dim, rank_table(mesh, rows, spec.segments), places)

    def select(self, buffer: Tensor) -> Tensor:
        return buffer.index_select(self.dim, self.own)

    def write(self, rows: Tensor, buffer: Tensor, mesh: DeviceMesh) -> None:
        complete = all_gather(rows, self.dim, mesh)
        buffer.copy_(complete if self.places is None else complete.index_select(self.dim, self.places))


def places_of_rows(gathered: list[int]) -> list[int] | None:
    """Where each row of a buffer stands among those of all ranks, which come rank by rank: with several segments that
    is not the buffer's order, and of a segment that every rank holds the first rank's rows are taken. None where the
    order is the buffer's."""
    if gathered == [*range(len(gathered))]:
        return None
    first = {row: place for place, row in reversed([*enumerate(gathered)])}
    return [first[row] for row in range(len(first))]


def view_buffers(module: nn.Module, mesh: DeviceMesh, specs: dict[str, ShardSpec]) -> None:
    """Let the module's forward see this rank's rows of each buffer that has a spec, and write into them."""
    tables = {name: _Rows.of(spec, mesh) for name, spec in specs.items() if name in module._buffers}
    if not tables:
        return
    rows = _BufferRows(tables, mesh, isinstance(module, _BATCH_NORMS))
    cls: Any = type(module)
    module.__class__ = _subclass(cls, tuple(sorted(tables)))
    module.register_forward_pre_hook(rows.before)
    module.register_forward_hook(rows.after)


class _BufferRows:
    """The hooks around a forward that sees rows of buffers, and may write them.

    Args:
        writes: forward writes them in a way that no version counts, as a batch norm's kernel.
    """

    def __init__(self, tables: dict[str, _Rows], mesh: DeviceMesh, writes: bool) -> None:
        self.tables, self.mesh, self.writes = tables, mesh, writes

    def before(self, module: nn.Module, _: Any) -> None:
        seen = {}
        with torch.no_grad():
            for name, rows in self.tables.items():
                buffer = module._buffers[name]
                if buffer is not None:
                    own = rows.select(buffer)
                    seen[name] = _Seen(own, version(own) if module.training else 0)  # evaluation writes none back
        module.__dict__[_SEEN] = seen

    def after(self, module: nn.Module, _: Any, __: Any) -> None:
        for name, seen in module.__dict__.pop(_SEEN).items():
            if module.training and (self.writes or version(seen.rows) != seen.version):
                buffer = module._buffers[name]
                assert buffer is not None
                with torch.no_grad():
                    self.tables[name].write(seen.rows, buffer, self.mesh)


@functools.cache  # one subclass for equal modules, as in sharding.local_view
def _subclass(cls: Any, names: tuple[str, ...]) -> Any:
    return subclass_in_its_place(cls, {name: _property(name) for name in names})


def _property(name: str) -> property:
    def read(module: nn.Module) -> Tensor | None:
        seen = module.__dict__.get(_SEEN, {}).get(name)
        return module._buffers[name] if seen is None else seen.rows

    def write(module: nn.Module, value: Tensor | None) -> None:
        module._buffers[name] = value

    return property(read, write)
