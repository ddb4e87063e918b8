"""The copy engine's slots and flags, on simulated streams: the real exchanges, their stream operations run in random
orders in which ranks and streams may lead each other as they like.

A chunk is written in two halves; what was sent is overwritten after `close`, as the allocator may; and each program is
played three times, as a CUDA graph is replayed. Every part of the protocol that is left out must show as a wrong chunk.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from colrow.ops import chunked, copy_engine
from colrow.ops.copy_engine import FREE, FULL, RING, CopyEngine, OneRankEngine, Ring
from colrow.ops.linear_options import LinearOptions

SHAPE = (4,)
SCHEDULES = 60
EXCHANGES = 5
Ready = Callable[[], bool]


@dataclass(eq=False)
class Stream:
    """Operations in order, each with when it may run; the next is number `at`."""

    ops: list[tuple[Ready, Callable[[], None]]] = field(default_factory=list)
    at: int = 0

    def give(self, run: Callable[[], None], ready: Ready = lambda: True) -> None:
        self.ops.append((ready, run))


class Rank:
    """One rank's `StreamDevice`. `left_out` names a part of the protocol that is not done."""

    def __init__(self, flags: dict[Any, int], left_out: str, one_queue: bool) -> None:
        self.flags, self.left_out = flags, left_out
        self.main = Stream()
        self.side = self.main if one_queue else Stream()

    @property
    def streams(self) -> set[Stream]:
        return {self.main, self.side}

    def current(self) -> Stream:
        return self.main

    def follow(self, stream: Stream, leader: Stream) -> None:
        given = len(leader.ops)
        if self.left_out != ("close waits for copies" if stream is self.main else "copies wait for products"):
            stream.give(lambda: None, lambda: stream is leader or leader.at >= given)

    def copy(self, stream: Stream, target: Tensor, source: Tensor) -> None:
        for half in (slice(0, 2), slice(2, 4)):
            stream.give(lambda half=half: target[half].copy_(source[half]))  # type: ignore[misc]

    def put(self, stream: Stream, *flags: Any) -> None:
        for flag in flags:
            stream.give(lambda flag=flag: self.flags.update({flag: 1}))  # type: ignore[misc]

    def take(self, stream: Stream, *flags: Any) -> None:
        for flag in flags:
            kind = {FULL: "full is taken", FREE: "free is taken"}[flag[1]]
            if self.left_out != kind:
                stream.give(
                    lambda flag=flag: self.flags.update({flag: 0}),  # type: ignore[misc]
                    lambda flag=flag: self.flags[flag] == 1,  # type: ignore[misc]
                )


def program(rank: int, n: int, device: Rank, engine: CopyEngine, together: int, wrong: list[str]) -> None:
    """Exchanges one after the other, `together` of them open at a time; each chunk's number says whose it is.

    Every other one is a gather: one chunk for all ranks, received together."""
    main = device.main

    def number(exchange: int, sender: int, receiver: int) -> float:
        return 100.0 * exchange + 10 * sender + (9 if exchange % 2 else receiver)

    def look(slot: Tensor, want: float) -> None:
        if not (slot == want).all():
            wrong.append(f"{slot.tolist()} instead of {want}")

    for start in range(0, EXCHANGES * together, together):
        opened = []
        for k in range(start, start + together):
            exchange, chunks = engine.open(SHAPE, torch.float32), []
            for i in range(1, n):
                if i == 1 or k % 2 == 0:
                    chunk, value = torch.full(SHAPE, -1.0), number(k, rank, exchange.after(i))
                    main.give(lambda chunk=chunk, value=value: chunk.fill_(value))  # type: ignore[misc]
                    chunks.append(chunk)
                exchange.send(i, chunk)
            opened.append((k, exchange, chunks))
        for k, exchange, chunks in opened:
            if k % 2:
                exchange.receive_all()
            for i in range(1, n):
                slot = exchange.slots[exchange.before(i)] if k % 2 else exchange.receive(i)
                value = number(k, exchange.before(i), rank)
                main.give(lambda slot=slot, value=value: look(slot, value))  # type: ignore[misc]
            main.give(lambda exchange=exchange: exchange.own.fill_(-3.0))  # type: ignore[misc]
            exchange.close()
            for chunk in chunks:
                main.give(lambda chunk=chunk: chunk.fill_(-2.0))  # type: ignore[misc]


def play(
    n: int, seed: int, left_out: str = "", one_queue: bool = False, together: int = 1, replays: int = 3
) -> list[str]:
    """The wrong chunks of one random order; `deadlock` when nothing can run any more."""
    rng, wrong = random.Random(seed), []  # type: ignore[var-annotated]
    places = [(holder, slot, peer) for holder in range(n) for slot in range(RING) for peer in range(n)]
    flags = {(holder, kind, slot, peer): int(kind == FREE) for holder, slot, peer in places for kind in (FULL, FREE)}
    slots = [torch.zeros(RING, 4 * n * 4, dtype=torch.uint8) for _ in range(n)]
    ranks = [Rank(flags, left_out, one_queue) for _ in range(n)]
    for rank, device in enumerate(ranks):

        def ring(nbytes: int, rank: int = rank) -> Ring:
            return Ring(rank, slots, lambda holder, kind, slot, peer: (holder, kind, slot, peer))

        program(rank, n, device, CopyEngine(device, device.side, n, ring), together, wrong)
    left = dict.fromkeys(ranks, replays)
    eagerness = {stream: rng.choice([0.02, 1.0, 5.0]) for device in ranks for stream in device.streams}
    while left:
        for device in list(left):
            if all(stream.at == len(stream.ops) for stream in device.streams):
                left[device] -= 1
                for stream in device.streams:
                    stream.at = 0
                if not left[device]:
                    del left[device]
        streams = [s for device in left for s in device.streams if s.at < len(s.ops) and s.ops[s.at][0]()]
        if left and not streams:
            return [*wrong, "deadlock"]
        if streams:
            (stream,) = rng.choices(streams, [eagerness[s] for s in streams])
            stream.ops[stream.at][1]()
            stream.at += 1
    assert flags == {key: int(key[1] == FREE) for key in flags} or left_out, "a flag is not where it was"
    return wrong


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("together", [1, RING])
def test_no_order_of_streams_gives_a_wrong_chunk(n: int, together: int) -> None:
    for seed in range(SCHEDULES // n):
        assert play(n, seed, together=together) == []


@pytest.mark.parametrize(
    "left_out", ["free is taken", "full is taken", "copies wait for products", "close waits for copies"]
)
def test_each_part_of_the_protocol_is_needed(left_out: str) -> None:
    """A slot that is reused without its acknowledgement, for one."""
    assert any(play(2, seed, left_out, together=RING) for seed in range(SCHEDULES))


def test_one_hardware_queue_does_not_deadlock() -> None:
    """Streams may share a queue of the GPU, and then wait for each other in the order of submission."""
    for seed in range(20):
        assert play(3, seed, one_queue=True, together=RING) == []
    assert play(3, 0, one_queue=True, together=RING + 1) == ["deadlock"]


class AtOnce:
    """A device that does everything at once; a flag that is taken must be put."""

    def __init__(self, flags: dict[Any, int]) -> None:
        self.flags = flags

    def current(self) -> None: ...

    def follow(self, stream: Any, leader: Any) -> None: ...

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def put(self, stream: Any, *flags: Any) -> None:
        for flag in flags:
            assert not self.flags[flag], "put twice"
            self.flags[flag] = 1

    def take(self, stream: Any, *flags: Any) -> None:
        for flag in flags:
            assert self.flags[flag], "nobody puts it: on a GPU this stream would wait for ever"
            self.flags[flag] = 0


def one_rank_engine(n: int) -> OneRankEngine:
    flags = {
        (kind, slot, peer): int(kind == FREE) for kind in (FULL, FREE) for slot in range(RING) for peer in range(n)
    }

    def ring(nbytes: int) -> Ring:
        slots = torch.zeros(RING, nbytes, dtype=torch.uint8)
        flag = copy_engine.one_rank_flags(0, n)
        return Ring(0, [slots] * n, lambda holder, kind, slot, peer: (kind, slot, flag(holder, peer)))

    return OneRankEngine(AtOnce(flags), None, n, ring)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_rank_alone_gets_what_it_sends(n: int) -> None:
    engine, x, w = one_rank_engine(n), torch.randn(3, 5), torch.randn(2, 5)
    for _ in range(3 * RING):  # flags are back where they were
        y, gathered = chunked.column_forward(x, [w], engine, LinearOptions())
        assert torch.equal(gathered, x.repeat(n, 1))
        torch.testing.assert_close(y, gathered @ w.t())
        rows = torch.randn(n * 3, 5)
        y = chunked.row_forward(rows, w, engine, LinearOptions())
        torch.testing.assert_close(y, (rows @ w.t()).unflatten(0, (n, 3)).sum(0))


def test_a_flag_at_the_wrong_place_would_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_engine, "one_rank_flags", lambda rank, n: lambda owner, peer: peer)
    with pytest.raises(AssertionError, match="for ever"):
        chunked.column_forward(
            torch.randn(3, 5), [torch.randn(2, 5)], one_rank_engine(2), LinearOptions(keep_gathered=False)
        )
