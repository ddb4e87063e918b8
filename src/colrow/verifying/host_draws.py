"""Random numbers that a model's code draws on the host, mostly to decide what it computes.

[Note: deciding draws]
A branch that a random number takes one time in twenty (a layer left out, features mixed) need not be taken in the two
forwards of a comparison. So where code draws from Python's or numpy's generators, or one element from torch's, the
models are compared with the first of these draws at their least, and at their most, too. In between, the unsharded
model alone is run with draws at many places, also between the numbers that stand in its code: where it runs an operator
that it has not run before, the models are compared. Later draws stay random: code that draws until a number fits would
not end.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colrow.parallel.random_state import Generators
from colrow.verifying.kept_values import kept_values

_FIRST = 64
"""Words of 32 bits, two a float: that many layers may decide."""
_PYTHON: Any = random.Random
_BELOW = _PYTHON._randbelow
_NUMBERS = {torch.rand, torch.rand_like, Tensor.uniform_}
_NORMALS = {torch.randn, torch.randn_like}
_INTEGERS = {torch.randint, torch.randint_like}
_COINS = {torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_}
_DRAWS = _NUMBERS | _NORMALS | _INTEGERS | _COINS
_GRID = 41
"""Places between 0 and 1 that are tried. A prime: powers of two would give numpy's integers the same low bits."""
_MOST_PLACES = 120


class HostDraws(TorchFunctionMode):
    """Within, all that code of `model` draws follows from `seed`, and Python's and numpy's generators are the caller's
    again behind it.

    Args:
        at: where the first draws on the host lie, each between 0 and 1 of what it could be, and again from the start;
            empty: where the seed says.

    Attributes:
        drew: the code has drawn on the host.
        bounds: of integers that it drew, how many there were to draw from.
    """

    def __init__(self, model: nn.Module, seed: int, at: Sequence[float] = ()) -> None:
        super().__init__()
        self.drew, self.bounds = False, set[int]()
        self._seed, self._at, self._generators = seed, at, Generators([model], "cpu")
        found = {id(kept.value): kept.value for kept in kept_values(model)}
        kept = [generator for generator in found.values() if isinstance(generator, _OF_CODE)]
        self._kept = [generator for generator in kept if not isinstance(generator, random.SystemRandom)]  # has no state

    def __enter__(self) -> HostDraws:
        self._restore = self._generators.beyond_torch()
        torch.manual_seed(self._seed)
        self._generators.seed(self._seed)
        if self._at:
            words = _words(self._at)
            random.setstate(_python_state(random.getstate(), words))
            np.random.set_state(_mersenne_state(words, np.random.get_state()))
            for generator in self._kept:
                _set_first(generator, words)
        integers = itertools.islice(itertools.cycle(self._at), _FIRST)
        self._tensors = itertools.cycle(self._at)

        def below(own: random.Random, n: int) -> int:
            self.bounds.add(n)
            # Python draws an integer below n from top bits, again until they are below n
            return int(_BELOW(own, n) if (at := next(integers, None)) is None else at * n)

        _PYTHON._randbelow = below
        self._before = self._states()
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in _DRAWS or not isinstance(result, Tensor) or result.numel() != 1:
            return result
        self.drew = True
        numbers = [x for x in (*args, *kwargs.values()) if isinstance(x, int | float) and not isinstance(x, bool)]
        low, high = numbers[:2] if len(numbers) > 1 else (0, *(numbers or [1]))
        if func in _INTEGERS:
            self.bounds.add(int(high - low))
        if not self._at:
            return result
        at = next(self._tensors)
        if result.is_floating_point():
            at = min(at, 1 - torch.finfo(result.dtype).eps)
        if func in _COINS:
            return result.fill_(float(at >= 0.5))
        if func in _NORMALS:
            return result.fill_(statistics.NormalDist().inv_cdf(min(max(at, 1e-12), 1 - 1e-12)))
        if func in _INTEGERS:
            return result.fill_(low + int(at * (high - low)))
        return result.fill_(low + at * (high - low) if func is Tensor.uniform_ else at)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.drew |= self._states() != self._before
        _PYTHON._randbelow = _BELOW
        for set_state in self._restore:
            set_state()

    def _states(self) -> list[Any]:
        state: Any = np.random.get_state()
        return [random.getstate(), state[1].tobytes(), state[2], *map(_state, self._kept)]


LEAST, MOST = 0.0, 1 - 2**-53


def places(numbers: Sequence[int | float], bounds: Iterable[int]) -> list[float]:
    """Places of draws between 0 and 1 to try.

    Args:
        numbers: that stand in the code that draws: a draw is compared with some of them.
        bounds: as `HostDraws` has them.
    """
    ends = {i / _GRID for i in range(_GRID + 1)} | {x for n in numbers for x in (n, 1 - n) if 0 < x < 1}
    ratios = {a / b for a in numbers for b in (10, 100, *numbers) if b and 0 < a / b < 1}  # as of uniform(0, 10)
    if len(ends | ratios) <= _MOST_PLACES:
        ends |= ratios
    exact = {(i + 0.5) / n for n in bounds for i in range(min(n, _GRID))}
    exact |= {(n + 0.5) / m for n in map(int, numbers) for m in (*bounds, _LOW_BITS) if 0 <= n < m}
    ordered = sorted(ends)
    between = [(a + b) / 2 for a, b in itertools.pairwise(ordered)]
    return [*between[:_MOST_PLACES], *sorted(exact)[:_MOST_PLACES]]


_LOW_BITS = 4096
PAIRS = tuple(itertools.permutations((LEAST, 0.25, 0.5, 0.75, MOST), 2))
"""Where two draws in turn lie."""


def _words(at: Sequence[float]) -> list[int]:
    """The first words of a generator whose draws lie there; two words each.

    A float is made of the top bits. numpy draws an integer below n from the low bits, again until they are below n: as
    they count down, the first that fits is n - 1 for the most.
    """
    draws = list(itertools.islice(itertools.cycle(at), _FIRST // 2))
    return [
        int(x * 2**32) & ~(_LOW_BITS - 1) | max(int(x * _LOW_BITS) - 2 * i - second, 0)
        for i, x in enumerate(draws)
        for second in (0, 1)
    ]


def _state_word(output: int) -> int:
    """The word of the Mersenne twister's state that it gives out as `output`: its tempering, undone."""
    y = output ^ output >> 18
    y ^= y << 15 & 0xEFC60000
    x = y
    for _ in range(4):  # each pass sets seven bits more
        x = y ^ (x << 7 & 0x9D2C5680)
    return x ^ x >> 11 ^ x >> 22


def _python_state(state: Any, words: Sequence[int]) -> Any:
    version, held, normal = state
    return version, (*map(_state_word, words), *held[_FIRST:-1], 0), normal


def _mersenne_state(words: Sequence[int], state: Any) -> Any:
    first = np.array([_state_word(word) for word in words], dtype=np.uint32)
    return "MT19937", np.concatenate([first, state[1][_FIRST:]]), 0, 0, 0.0


_OF_CODE = (random.Random, np.random.RandomState, np.random.Generator)
_PCG_FACTOR = 0x2360ED051FC65DA44385DF649FCCF645


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        state: Any = generator.get_state()
        return state[1].tobytes(), state[2]
    return repr(generator.bit_generator.state)


def _set_first(generator: Any, words: Sequence[int]) -> None:
    """Let the generator give out these words first; numpy's newer ones the first of them alone."""
    if isinstance(generator, random.Random):
        generator.setstate(_python_state(generator.getstate(), words))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_mersenne_state(words, generator.get_state()))
    elif isinstance(generator.bit_generator, np.random.PCG64):
        # It steps, s -> factor * s + increment mod 2^128, and gives the lower half where the upper one is zero.
        state: Any = generator.bit_generator.state
        wanted = words[0] << 32 | words[0]
        before = (wanted - state["state"]["inc"]) * pow(_PCG_FACTOR, -1, 2**128) % 2**128
        state["state"]["state"], state["has_uint32"] = before, 0
        generator.bit_generator.state = state
