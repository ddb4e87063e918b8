"""Whole tensors out of the pieces that ranks hold, each on the rank that writes it.

Words: a queue is the names that one rank collects, in order. Round k is the k-th name of every queue: each rank
collects one tensor and gives its pieces of the others'. So no rank ever holds more than one whole tensor, and no two
ranks wait for each other.
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


@dataclass(frozen=True)
class Block:
    """Elements of a tensor, as an offset and a size in each dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))


@dataclass(frozen=True)
class Whole:
    """A tensor that the ranks hold together, and which ranks hold each of its blocks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    holders: dict[Block, list[int]]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def catalogue(ranks: Ranks, pieces: Sequence[Piece], dtype: torch.dtype) -> dict[str, Whole]:
    """Every tensor that some rank holds, in the order of ranks and of their pieces. Collective.

    Floating-point tensors are catalogued as `dtype`, in which they will be collected.
    """
    mine = [(p.name, p.shape, p.data.dtype, Block(p.offset, tuple(p.data.shape))) for p in pieces]
    tensors: dict[str, Whole] = {}
    for rank, theirs in enumerate(ranks.gather(mine)):
        for name, shape, held_in, block in theirs:
            kept = dtype if held_in.is_floating_point else held_in
            whole = tensors.setdefault(name, Whole(shape, kept, {}))
            assert whole.shape == shape, f"{name}: {shape} on rank {rank}, {whole.shape} on another"
            whole.holders.setdefault(block, []).append(rank)
    for name, whole in tensors.items():
        covered = sum(prod(block.size) for block in whole.holders)
        assert covered == prod(whole.shape), f"{name}: the ranks hold {covered} elements of {prod(whole.shape)}"
    return tensors


class Gather:
    """Collects the tensors of all queues, round by round.

    Args:
        queues: for each rank, the names that it collects. All ranks give the same.
    """

    def __init__(
        self, ranks: Ranks, pieces: Sequence[Piece], tensors: dict[str, Whole], queues: Sequence[Sequence[str]]
    ):
        self._ranks = ranks
        self._tensors = tensors
        self._queues = queues
        self._data = {(p.name, Block(p.offset, tuple(p.data.shape))): p.data for p in pieces}
        self._round = 0

    def next(self, name: str) -> Tensor:
        """The tensor `name`, in host memory: the next one of this rank's queue. Other ranks run the same round."""
        assert self._queues[self._ranks.rank][self._round] == name
        collected = self._exchange()
        assert collected is not None
        return collected

    def finish(self) -> None:
        """Run the rounds that other ranks still need, also when this one has given up collecting."""
        while self._round < max(map(len, self._queues)):
            self._exchange()

    def _exchange(self) -> Tensor | None:
        me, group, place = self._ranks.rank, self._ranks.group, self._round
        self._round += 1
        waits: list[dist.Work | None] = []
        sent, received = [], []
        for collector, queue in enumerate(self._queues):
            if place >= len(queue):
                continue
            name = queue[place]
            for giver, blocks in self._givers(name, place, collector).items():
                if me == giver != collector:
                    sent.append(self._flat(name, blocks))
                    waits.append(dist.isend(sent[-1], group=group, group_dst=collector))
                elif me == collector != giver:
                    buffer = torch.empty(sum(prod(b.size) for b in blocks), dtype=self._tensors[name].dtype)
                    received.append((blocks, buffer))
                    waits.append(dist.irecv(buffer, group=group, group_src=giver))
                elif me == collector == giver:
                    received.append((blocks, self._flat(name, blocks)))
        for work in waits:
            if work is not None:
                work.wait()
        mine = self._queues[me]
        return _assemble(self._tensors[mine[place]], received) if place < len(mine) else None

    def _givers(self, name: str, place: int, collector: int) -> dict[int, list[Block]]:
        """Which rank gives which blocks: the collector itself what it has, else the holders in turn."""
        givers: dict[int, list[Block]] = {}
        for block, holders in self._tensors[name].holders.items():
            giver = collector if collector in holders else holders[(place + collector) % len(holders)]
            givers.setdefault(giver, []).append(block)
        return givers

    def _flat(self, name: str, blocks: list[Block]) -> Tensor:
        dtype = self._tensors[name].dtype
        return torch.cat([self._data[name, block].detach().to(dtype).cpu().reshape(-1) for block in blocks])


def _assemble(whole: Whole, received: list[tuple[list[Block], Tensor]]) -> Tensor:
    tensor = torch.empty(whole.shape, dtype=whole.dtype)
    for blocks, flat in received:
        parts = flat.split([prod(block.size) for block in blocks])
        for block, part in zip(blocks, parts, strict=True):
            tensor[block.slices] = part.view(block.size)
    return tensor
