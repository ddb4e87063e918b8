"""Gathered tensors out of the pieces that ranks hold, each on the rank that writes it.

[Note: rounds]
A queue is the names that one rank gathers, in order. In round k each rank gathers the k-th tensor of its own queue and
sends its pieces of the k-th tensors of the other queues. Within a round all sends and receives are started before any
is waited for, so ranks cannot deadlock; and no rank holds more than one gathered tensor at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.checkpoint.pieces import Piece
from colrow.checkpoint.ranks import Ranks
from colrow.sharding.layout import Region


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor that the ranks hold together, and which ranks hold each of its regions."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    holders: dict[Region, list[int]]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def catalogue(ranks: Ranks, pieces: Sequence[Piece], dtype: torch.dtype) -> dict[str, GlobalTensor]:
    """Every tensor that some rank holds, in the order of ranks and of their pieces. Collective.

    Floating-point tensors are catalogued as `dtype`, in which they will be gathered.
    """
    mine = [(p.name, p.shape, p.data.dtype, p.region) for p in pieces]
    tensors: dict[str, GlobalTensor] = {}
    for rank, theirs in enumerate(ranks.gather(mine)):
        for name, shape, held_dtype, region in theirs:
            written_dtype = dtype if held_dtype.is_floating_point else held_dtype
            tensor = tensors.setdefault(name, GlobalTensor(shape, written_dtype, {}))
            assert tensor.shape == shape, f"{name}: {shape} on rank {rank}, {tensor.shape} on another"
            tensor.holders.setdefault(region, []).append(rank)
    for name, tensor in tensors.items():
        covered = sum(region.numel for region in tensor.holders)
        assert covered == prod(tensor.shape), f"{name}: the ranks hold {covered} elements of {prod(tensor.shape)}"
    return tensors


class Gather:
    """Gathers the tensors of all queues, round by round: see [Note: rounds].

    Args:
        queues: for each rank, the names that it gathers. The same on all ranks.
    """

    def __init__(
        self, ranks: Ranks, pieces: Sequence[Piece], tensors: dict[str, GlobalTensor], queues: Sequence[Sequence[str]]
    ):
        self._ranks = ranks
        self._tensors = tensors
        self._queues = queues
        self._data = {(p.name, p.region): p.data for p in pieces}
        self._round = 0

    def next(self, name: str) -> Tensor:
        """The tensor `name`, in host memory: the next one of this rank's queue. Other ranks run the same round."""
        assert self._queues[self._ranks.rank][self._round] == name
        gathered = self._exchange()
        assert gathered is not None
        return gathered

    def finish(self) -> None:
        """Run the rounds that other ranks still need, also when this one has stopped gathering after an error."""
        while self._round < max(map(len, self._queues)):
            self._exchange()

    def _exchange(self) -> Tensor | None:
        me, group, number = self._ranks.rank, self._ranks.group, self._round
        self._round += 1
        waits: list[dist.Work | None] = []
        sent, received = [], []  # `sent` keeps the buffers alive until the sends are done
        for receiver, queue in enumerate(self._queues):
            if number >= len(queue):
                continue
            name = queue[number]
            for sender, regions in self._senders(name, number, receiver).items():
                if me == sender != receiver:
                    sent.append(self._flatten(name, regions))
                    # one message per pair of ranks and round: their order alone matches sends with receives
                    waits.append(dist.isend(sent[-1], group=group, group_dst=receiver))
                elif me == receiver != sender:
                    buffer = torch.empty(sum(region.numel for region in regions), dtype=self._tensors[name].dtype)
                    received.append((regions, buffer))
                    waits.append(dist.irecv(buffer, group=group, group_src=sender))
                elif me == receiver == sender:
                    received.append((regions, self._flatten(name, regions)))
        for work in waits:
            if work is not None:
                work.wait()
        mine = self._queues[me]  # shorter than the longest queue: such a rank only sends
        return _assemble(self._tensors[mine[number]], received) if number < len(mine) else None

    def _senders(self, name: str, number: int, receiver: int) -> dict[int, list[Region]]:
        """Which rank sends which regions: the receiver has its own; of replicas, round and receiver choose in turn."""
        senders: dict[int, list[Region]] = {}
        for region, holders in self._tensors[name].holders.items():
            sender = receiver if receiver in holders else holders[(number + receiver) % len(holders)]
            senders.setdefault(sender, []).append(region)
        return senders

    def _flatten(self, name: str, regions: list[Region]) -> Tensor:
        """One message for all regions that go to one rank."""
        dtype = self._tensors[name].dtype
        return torch.cat([self._data[name, region].detach().to(dtype).cpu().reshape(-1) for region in regions])


def _assemble(tensor: GlobalTensor, received: list[tuple[list[Region], Tensor]]) -> Tensor:
    gathered = torch.empty(tensor.shape, dtype=tensor.dtype)
    for regions, flat in received:
        for region, data in zip(regions, flat.split([region.numel for region in regions]), strict=True):
            gathered[region.slices] = data.view(region.size)
    return gathered
