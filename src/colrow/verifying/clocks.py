"""Clocks, and random numbers of the system, that a model's code reads: set to other values.

[Note: clocks]
Ranks read their clocks at other moments, so a branch on one parts them, and training reads others than a proof does.
So the unsharded model alone is run with clocks at many moments, also where they reach the numbers that they meet. Where
it then runs other operators, or gets another loss, the plan cannot be proved. What is read for a log changes nothing.
The same holds of what no seed reaches: `os.urandom`, and what draws from it (`secrets`, `uuid4`, `SystemRandom`,
generators made without a seed, `torch.seed`), and a process's number.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import random
import secrets
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from colrow.torch_compat import path_in_torch
from colrow.verifying.counters import recording
from colrow.verifying.host_draws import LEAST, MOST, places
from colrow.verifying.kept_values import kept_values

Moment = Callable[[int], float]
"""Seconds since 1970 that a clock says, by the number of readings before."""
_SECONDS = ("time", "monotonic", "perf_counter", "process_time", "thread_time")
_NANOSECONDS = tuple(f"{name}_ns" for name in _SECONDS)
_OF_SECONDS = ("localtime", "gmtime", "ctime")
_START = 1.8e9
_DRAWING = {random.__file__, secrets.__file__, uuid.__file__}
"""Files that draw for the code that calls them."""
_FIRST = 64
_SEEDS = 64
_STDLIB, _PACKAGES, _COLROW = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), Path(__file__).parents[1]


def moments(met: Iterable[float] = ()) -> list[Moment]:
    """Clocks that stand, at another hour, weekday, month and fraction of a second each, and clocks that run.

    Args:
        met: numbers that readings were compared with: some clocks stand or run so that they reach these.
    """
    standing = [_START + i * (31 * 86400 + 3600 + 61 + 1 / 24) for i in range(24)]
    standing += [x for n in met for x in (n, n * 1.01, (n + 0.5) / 1e9)]
    running = [1e-3, 1.0, 60.0, 1e6, *(n * 1.01 for n in met)]
    return [
        *(lambda readings, at=at: at for at in standing),
        *(lambda readings, step=step: _START + readings * step for step in running),
    ]


def system_draws(numbers: Sequence[int | float], bounds: Iterable[int]) -> Iterator[SystemDraws]:
    """Many that differ. Args: as `host_draws.places` has them."""
    yield from (SystemDraws(seed) for seed in range(_SEEDS))
    yield from (SystemDraws(_SEEDS + i, at) for i, at in enumerate((LEAST, MOST, *places(numbers, bounds))))


class SystemDraws:
    """What the system draws.

    Args:
        seed: of what it draws, and the process's number.
        at: where the first numbers lie, between 0 and 1 of what they could be; None: anywhere.
    """

    def __init__(self, seed: int, at: float | None = None) -> None:
        self.seed, self.at, self._drawn = seed, at, 0

    def next_place(self) -> float | None:
        """Where the next number lies."""
        self._drawn += 1
        return self.at if self._drawn <= _FIRST else None  # code may draw until a number fits

    def bytes(self, n: int) -> bytes:
        """The next ones, as of a number of n bytes, the highest first."""
        at = self.next_place()
        drawn = hashlib.shake_256(f"{self.seed} {self._drawn}".encode()).digest(n)
        top = min(n, 7)
        return drawn if at is None else int(at * 2 ** (8 * top)).to_bytes(top, "big") + drawn[top:]


class Clocks:
    """Within, clocks say other moments to the code of a model, the system draws other numbers, and to nobody else.

    Args:
        moment: None for what they say.
        draws: None for what it draws.

    Attributes:
        read: the clocks that the code has read, and sources of random numbers.
        met: the numbers that readings of clocks were compared or computed with.
        bounds: of integers that were drawn, how many there were to draw from.
    """

    def __init__(self, model: nn.Module, moment: Moment | None = None, draws: SystemDraws | None = None) -> None:
        self.read, self.met, self.bounds = set[str](), set[float](), set[int]()
        self._model, self._moment, self._draws, self._readings = model, moment, draws, 0
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Clocks:
        names = (*_SECONDS, *_NANOSECONDS, *_OF_SECONDS, "strftime")
        fakes = {id(real): self._fake(name, real) for name in names if (real := getattr(time, name, None)) is not None}
        fakes |= {id(datetime.datetime): self._datetime(), id(datetime.date): self._date()}
        fakes |= {id(os.urandom): self._urandom(os.urandom), id(os.getpid): self._getpid(os.getpid)}
        fakes[id(torch.seed)] = self._torch_seed(torch.seed)
        held = [(kept.value, kept.put) for kept in kept_values(self._model) if id(kept.value) in fakes]
        for module in (time, datetime, os, random, torch, torch.random):
            held += [(v, partial(setattr, module, k)) for k, v in vars(module).items() if id(v) in fakes]
        for real, put in held:
            put(fakes[id(real)])
            self._undo.append(partial(put, real))
        for cls, name, method in (
            (random.SystemRandom, "_randbelow", self._below),
            (random.Random, "seed", self._seed),
        ):
            before: Any = getattr(cls, name)
            setattr(cls, name, method(before))
            self._undo.append(partial(setattr, cls, name, before))
        return self

    def __exit__(self, *exception: Any) -> None:
        for undo in self._undo:
            undo()

    def _reads(self, name: str, caller: FrameType | None) -> bool:
        """Whether the model's code reads this."""
        while caller is not None and caller.f_code.co_filename in _DRAWING:
            caller = caller.f_back
        file = "" if caller is None else caller.f_code.co_filename
        librarys = file.startswith(_STDLIB) and not file.startswith(_PACKAGES)
        if caller is None or path_in_torch(caller) is not None or librarys or file.startswith(str(_COLROW)):
            return False
        self.read.add(name)
        return True

    def _urandom(self, real: Any) -> Callable[[int], bytes]:
        def urandom(n: int) -> bytes:
            drawn: bytes = real(n)
            return self._draws.bytes(n) if self._reads("os.urandom", sys._getframe(1)) and self._draws else drawn

        return urandom

    def _getpid(self, real: Any) -> Callable[[], int]:
        def getpid() -> int:
            number: int = real()
            return self._draws.seed if self._reads("os.getpid", sys._getframe(1)) and self._draws else number

        return getpid

    def _below(self, real: Any) -> Callable[[Any, int], int]:
        def below(own: Any, n: int) -> int:
            if not self._reads("random.SystemRandom", sys._getframe(1)):
                return int(real(own, n))
            self.bounds.add(n)
            at = self._draws.next_place() if self._draws else None
            return int(real(own, n) if at is None else at * n)

        return below

    def _seed(self, real: Any) -> Callable[..., None]:
        def seed(own: Any, a: Any = None, version: int = 2) -> None:
            if a is None and self._reads("random.Random without a seed", sys._getframe(1)) and self._draws:
                a = self._draws.bytes(8)
            real(own, a, version)

        return seed

    def _torch_seed(self, real: Callable[[], int]) -> Callable[[], int]:
        def seed() -> int:
            if not self._reads("torch.seed", sys._getframe(1)) or not self._draws:
                return real()
            drawn = int.from_bytes(self._draws.bytes(7), "little")
            torch.manual_seed(drawn)
            return drawn

        return seed

    def _now(self, name: str, caller: FrameType) -> float | None:
        """The moment that a clock says; None for what it says."""
        if not self._reads(name, caller):
            return None
        self._readings += 1
        return None if self._moment is None else self._moment(self._readings - 1)

    def _fake(self, name: str, real: Any) -> Callable[..., Any]:
        localtime = time.localtime

        def read(*args: Any) -> Any:
            now = self._now(f"time.{name}", sys._getframe(1))
            if now is None:
                return real(*args)
            if name in _NANOSECONDS:
                return recording(int(now * 1e9), self.met)
            if name in _SECONDS:
                return recording(now, self.met)
            if name in _OF_SECONDS:
                return real(*(args or (now,)))
            return real(*args, localtime(now)) if len(args) == 1 else real(*args)

        return read

    def _datetime(self) -> type:
        real = datetime.datetime

        def now(cls: Any, tz: Any = None) -> Any:
            moment = self._now("datetime.now", sys._getframe(1))
            return real.now(tz) if moment is None else real.fromtimestamp(moment, tz)

        def utcnow(cls: Any) -> Any:
            moment = self._now("datetime.utcnow", sys._getframe(1))
            seconds = time.time() if moment is None else moment
            return real.fromtimestamp(seconds, datetime.UTC).replace(tzinfo=None)

        return _in_place_of(real, now=now, today=now, utcnow=utcnow)

    def _date(self) -> type:
        real = datetime.date

        def today(cls: Any) -> Any:
            moment = self._now("date.today", sys._getframe(1))
            return real.today() if moment is None else real.fromtimestamp(moment)

        return _in_place_of(real, today=today)


def _in_place_of(real: type, **methods: Callable[..., Any]) -> type:
    """A class with other class methods, whose instances are those of `real`."""
    kind = type("Kind", (type,), {"__instancecheck__": lambda cls, instance: isinstance(instance, real)})
    found: type = kind(real.__name__, (real,), {name: classmethod(method) for name, method in methods.items()})
    return found
