"""Clocks that a model's code reads, set to other moments.

[Note: clocks]
Ranks read their clocks at other moments, so a branch on one parts them, and training reads others than a proof does.
So the unsharded model alone is run with clocks at many moments, also where they reach the numbers that they meet. Where
it then runs other operators, or gets another loss, the plan cannot be proved. What is read for a log changes nothing.
"""

from __future__ import annotations

import datetime
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from colrow.torch_compat import path_in_torch
from colrow.verifying.counters import recording
from colrow.verifying.kept_values import kept_values

Moment = Callable[[int], float]
"""Seconds since 1970 that a clock says, by the number of readings before."""
_SECONDS = ("time", "monotonic", "perf_counter", "process_time", "thread_time")
_NANOSECONDS = tuple(f"{name}_ns" for name in _SECONDS)
_OF_SECONDS = ("localtime", "gmtime", "ctime")
_START = 1.8e9
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


class Clocks:
    """Within, clocks say other moments to the code of a model, and to nobody else.

    Args:
        moment: None for what they say.

    Attributes:
        read: the clocks that the code has read.
        met: the numbers that readings were compared or computed with.
    """

    def __init__(self, model: nn.Module, moment: Moment | None = None) -> None:
        self.read, self.met = set[str](), set[float]()
        self._model, self._moment, self._readings = model, moment, 0
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Clocks:
        names = (*_SECONDS, *_NANOSECONDS, *_OF_SECONDS, "strftime")
        fakes = {id(real): self._fake(name, real) for name in names if (real := getattr(time, name, None)) is not None}
        fakes |= {id(datetime.datetime): self._datetime(), id(datetime.date): self._date()}
        held = [(kept.value, kept.put) for kept in kept_values(self._model) if id(kept.value) in fakes]
        for module in (time, datetime):
            held += [(v, partial(setattr, module, k)) for k, v in vars(module).items() if id(v) in fakes]
        for real, put in held:
            put(fakes[id(real)])
            self._undo.append(partial(put, real))
        return self

    def __exit__(self, *exception: Any) -> None:
        for undo in self._undo:
            undo()

    def _now(self, name: str, caller: FrameType) -> float | None:
        """The moment that a clock says; None for what it says."""
        file = caller.f_code.co_filename
        librarys = file.startswith(_STDLIB) and not file.startswith(_PACKAGES)
        if path_in_torch(caller) is not None or librarys or file.startswith(str(_COLROW)):
            return None
        self.read.add(name)
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
