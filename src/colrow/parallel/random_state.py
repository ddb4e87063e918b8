"""Every random number generator that a model may draw from: torch's, Python's, numpy's, and those that it owns.

[Note: random numbers]
Before a micro-batch every generator gets a state that follows from (seed, step, number of the micro-batch) and, with
pipelines, the stage. Micro-batches are numbered over all data ranks, as `data.loader` deals them: data ranks draw
different numbers, and another number of data ranks draws the same ones for the same sequences. The ranks of a tp group
have the number in common, so they draw the same where each holds the unsharded tensor. Nothing is stored: a run that
goes on from a checkpoint draws what the uninterrupted one draws.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

_OWNED = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def derive_seed(*parts: int | str) -> int:
    """A seed below 2^63 that follows from `parts`; other parts give an independent one."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Generators:
    """The generators that `modules` may draw from on `device`: global ones, and attributes of the modules."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._owned = {
            f"{name}.{key}": value
            for model in modules
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, _OWNED) and not isinstance(value, random.SystemRandom)  # the system's has no state
        }

    def seed(self, seed: int) -> None:
        """Give every generator a state that follows from `seed`; each its own."""
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        for name, generator in self._owned.items():
            _seed_owned(generator, derive_seed(seed, name))

    def beyond_torch(self) -> list[Callable[[], None]]:
        """Functions that give the generators which torch's checkpoint does not know (Python's, numpy's, owned ones) the
        state that they have now."""
        return [
            _setter(random.setstate, random.getstate()),
            _setter(np.random.set_state, np.random.get_state()),
            *(_restore_owned(generator) for generator in self._owned.values()),
        ]

    @contextmanager
    def preserved(self, *, torchs: bool = True) -> Iterator[None]:
        """Leave every generator as it was; torch's global ones only if `torchs`."""
        restore = self.beyond_torch()
        if torchs:
            restore.append(_setter(torch.default_generator.set_state, torch.default_generator.get_state()))
        if torchs and self._device.type == "cuda":
            restore.append(_setter(torch.cuda.set_rng_state, torch.cuda.get_rng_state()))
        try:
            yield
        finally:
            for set_state in restore:
                set_state()


@dataclass
class MicroBatchSeeds:
    """Seeds the generators before each micro-batch of training; see [Note: random numbers].

    Attributes:
        data_rank, data_ranks: this rank's index on the data axes together, and how many there are.
        step: the optimizer step that runs, from 0.
    """

    generators: Generators
    seed: int
    data_rank: int = 0
    data_ranks: int = 1
    step: int = 0

    def start(self, micro_batch: int, stage: int = 0) -> None:
        """Before the forward of a pipeline stage on this rank's `micro_batch` (from 0)."""
        number = micro_batch * self.data_ranks + self.data_rank
        self.generators.seed(derive_seed("training", self.seed, self.step, number, stage))


def _setter(set_state: Callable[[Any], Any], state: Any) -> Callable[[], None]:
    return lambda: set_state(state)


def _seed_owned(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits: Any = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:
        generator.seed(seed % 2**32)  # numpy's RandomState takes 32 bits


def _restore_owned(generator: Any) -> Callable[[], None]:
    if isinstance(generator, torch.Generator):
        return _setter(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return _setter(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return _setter(generator.set_state, generator.get_state())
    bits: Any = generator.bit_generator
    return _setter(lambda state: setattr(bits, "state", state), bits.state)
