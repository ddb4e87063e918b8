"""The process group of one rank whose others are not there: torch's fake one, whose collectives send nothing.

A gather gives copies of the rank's own part, a reduce-scatter a part of what the rank has. So numbers keep the sizes
that they have in a run, and products the power that they take there; they are no result.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.ops.collectives import reduce_scatter
from colrow.torch_compat import fake_store, finished_work


@contextmanager
def alone(rank: int, world_size: int) -> Iterator[None]:
    """The default process group, of which only this rank is there."""
    with ExitStack() as stack:
        dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        if not _scatters():
            stack.callback(_copying_scatters()._destroy)
        yield


def _scatters() -> bool:
    """Whether the fake reduce-scatter writes its output; torch 2.11's does not."""
    group = dist.group.WORLD
    assert group is not None
    probe = torch.arange(1.0, group.size() + 1)
    return bool((reduce_scatter(probe, group) == probe[0]).all())


def _copying_scatters() -> Any:
    """Reduce-scatters of all groups copy, until what is returned is destroyed."""

    def one(output: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Any]:
        output.copy_(x.view(-1)[: output.numel()].view(output.shape))
        return output, finished_work()

    def several(outputs: list[Tensor], xs: list[Tensor], *_: Any) -> Any:
        for output, x in zip(outputs, xs, strict=True):
            one(output, x)
        return finished_work()

    library = torch.library.Library("c10d", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # of an operator that is replaced, as is meant
        for device in ("CPU", "CUDA"):
            library.impl("_reduce_scatter_base_", one, device, allow_override=True)
            library.impl("reduce_scatter_tensor_coalesced_", several, device, allow_override=True)
    return library
