"""Positions counted on a shard: `arange(h.shape[-1])` of a sharded h counts a rank's elements, not those of all.

As numbers they are wrong on all ranks but the first. As an index into that very dim they name each element of it once,
in order, on a rank as in the unsharded model: what is taken is the shard. Modulo a number that divides the shard's
length they are a shard of the positions modulo that number: the even ones are the even ones.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from colrow.sharding.local_call import LocalCall, UnprovenError
from colrow.sharding.local_layout import Kind, Layout, sharded

_VIEWS = ("view", "_unsafe_view", "unsqueeze", "squeeze")
_TAKES = ("index", "index_select", "gather")
_WRITES = ("index_put", "index_put_", "_index_put_impl", "_index_put_impl_", "_unsafe_index_put", "index_add",
           "index_add_", "scatter_add", "scatter_add_")  # fmt: skip
"""What takes by an index, and what makes the gradient of that."""


def positions_made(call: LocalCall) -> list[Layout] | None:
    """The layout of an `arange` from 0 that is as many times longer in the unsharded run as there are ranks; None of
    anything else."""
    if call.name != "arange" or call.wanted is None or call.argument("start")[0] or call.wanted == call.results:
        return None
    ((here,), (there,)) = call.results[0], call.wanted[0]
    steps = {step or 1 for step in call.argument("step")}
    return [Layout(Kind.POSITIONS, 0)] if here * call.ranks == there and steps == {1} else None


def of_positions(call: LocalCall) -> list[Layout]:
    """The layout of the result of an operator that gets such positions. Raises UnprovenError."""
    found = None
    if call.name == "expand":
        found = _expanded(call)
    elif call.name in _VIEWS:
        found = _viewed(call)
    elif call.name == "_to_copy":
        layout, there = call.tensors[0]
        found = layout if _is_exact(call.argument("dtype")[0] or there.dtype, there.shape[layout.dim]) else None
    elif call.name in ("remainder", "fmod"):
        found = _periodic(call)
    elif call.name in _TAKES or (call.name in _WRITES and 0 in call.zeros):
        found = _taken(call)
    if found is None:
        raise UnprovenError("it computes with positions that are counted on a shard", call.sharded_dim)
    return [found]


def _expanded(call: LocalCall) -> Layout | None:
    (layout, there), result = call.tensors[0], call.results[0]
    dim = layout.dim + len(result) - len(there.shape)
    wanted = call.wanted[0] if call.wanted else result
    same = all(a == b for d, (a, b) in enumerate(zip(result, wanted, strict=True)) if d != dim)
    return Layout(Kind.POSITIONS, dim) if same and result[dim] * call.ranks == wanted[dim] else None


def _viewed(call: LocalCall) -> Layout | None:
    """One row of positions, with other dims of one element."""
    here, wanted = call.results[0], call.wanted[0] if call.wanted else call.results[0]
    dims = [d for d, n in enumerate(here) if n != 1]
    is_row = len(dims) == 1 and len(wanted) == len(here) and prod(wanted) == here[dims[0]] * call.ranks
    return Layout(Kind.POSITIONS, dims[0]) if is_row and wanted[dims[0]] == prod(wanted) else None


def _periodic(call: LocalCall) -> Layout | None:
    """Modulo a number that divides the shard's length."""
    (layout, there), *others = call.tensors
    extent, divisor = there.shape[layout.dim], call.argument("other")[0]
    is_count = not others and divisor == int(divisor) and divisor > 0 and _is_exact(there.dtype, extent)
    return sharded(layout.dim) if is_count and extent // call.ranks % divisor == 0 else None


def _is_exact(dtype: torch.dtype, extent: int) -> bool:
    """Whether no position is rounded to another one, which may be another one on a shard."""
    return extent <= (2 / torch.finfo(dtype).eps if dtype.is_floating_point else torch.iinfo(dtype).max)


def _taken(call: LocalCall) -> Layout | None:
    """The layout of what is taken from, or of a gradient that is written into zeros."""
    tensors = [(layout, here, there) for i, (layout, here, there) in enumerate(
        zip(call.layouts, call.here, call.there, strict=True)) if layout and i not in call.zeros]  # fmt: skip
    positions = [each for each in tensors if each[0].kind is Kind.POSITIONS]
    values = [each for each in tensors if each[0].kind is not Kind.POSITIONS]
    if len(positions) != 1 or len(values) != 1:
        return None
    (index, *counted), (layout, here, there) = positions[0], values[0]
    dim = _dim(call)
    if dim is None or layout.kind is not Kind.SHARDED or layout.dim != dim or call.results[0] != here.shape:
        return None
    if call.name.startswith(("gather", "scatter")) and (index.dim, counted[0].shape) != (dim, here.shape):
        return None
    extents = [each.shape[index.dim] for each in counted]
    return layout if extents == [here.shape[dim], there.shape[dim]] else None


def _dim(call: LocalCall) -> int | None:
    """The dim in which positions are looked up; None where others are looked up as well."""
    if "indices" not in [argument.name for argument in call.func._schema.arguments]:
        dim: Any = call.argument("dim")[0]
        return int(dim) % len(call.results[0])
    given = [d for d, index in enumerate(call.argument("indices")[0]) if index is not None]
    return given[0] if len(given) == 1 else None
