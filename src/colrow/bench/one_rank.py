"""One rank of a mesh without the others, for `colrow bench --one-rank`: torch's fake process group sends nothing.

A gather returns copies of this rank's shard, a reduce-scatter a slice of this rank's input. Tensors, products and
memory have the sizes that they have in a run, so times and peaks are real; the numbers are meaningless.
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
def fake_group(rank: int, world_size: int) -> Iterator[None]:
    """The default process group of `world_size` ranks, of which only `rank` exists."""
    with ExitStack() as stack:
        dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        if not _reduce_scatter_writes():
            stack.callback(_replace_reduce_scatter()._destroy)
        yield


def _reduce_scatter_writes() -> bool:
    """Whether the fake reduce-scatter writes its output; torch 2.11's leaves it uninitialised."""
    group = dist.group.WORLD
    assert group is not None
    probe = torch.arange(1.0, group.size() + 1)
    return bool((reduce_scatter(probe, group) == probe[0]).all())


def _replace_reduce_scatter() -> Any:
    """Make the reduce-scatters of all groups copy a slice of their input, until the returned library is destroyed."""

    def scatter(output: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Any]:
        output.copy_(x.view(-1)[: output.numel()].view(output.shape))
        return output, finished_work()

    def scatter_all(outputs: list[Tensor], xs: list[Tensor], *_: Any) -> Any:
        for output, x in zip(outputs, xs, strict=True):
            scatter(output, x)
        return finished_work()

    library = torch.library.Library("c10d", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # torch warns that a registered operator is replaced: intended here
        for device in ("CPU", "CUDA"):
            library.impl("_reduce_scatter_base_", scatter, device, allow_override=True)
            library.impl("reduce_scatter_tensor_coalesced_", scatter_all, device, allow_override=True)
    return library
