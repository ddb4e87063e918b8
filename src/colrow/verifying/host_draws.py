"""Random numbers that a model's code draws on the host, mostly to decide what it computes.

[Note: deciding draws]
A branch that a random number takes one time in twenty (a layer left out, features mixed) need not be taken in the two
forwards of a comparison. So where code draws from Python's or numpy's global generator, or one element from torch's,
the models are compared with the first of these draws at their least, and at their most, too. Later draws stay random:
code that draws until a number fits would not end.
"""

from __future__ import annotations

import random
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colrow.parallel.random_state import Generators

Extreme = Literal["least", "most"]
_FIRST = 64
"""Words of 32 bits, two a float: that many layers may decide."""


def _state_word(output: int) -> int:
    """The word of the Mersenne twister's state that it gives out as `output`: its tempering, undone."""
    y = output ^ output >> 18
    y ^= y << 15 & 0xEFC60000
    x = y
    for _ in range(4):  # each pass sets seven bits more
        x = y ^ (x << 7 & 0x9D2C5680)
    return x ^ x >> 11 ^ x >> 22


_WORDS = {
    "least": (0,) * _FIRST,
    # numpy draws an integer below n until its low bits are below n: counted down, they first are at n - 1
    "most": tuple(_state_word(0xFFFFFFFF - i) for i in range(_FIRST)),
}
_PYTHON: Any = random.Random
_BELOW = _PYTHON._randbelow
_NUMBERS = {torch.rand, torch.rand_like, Tensor.uniform_}
_INTEGERS = {torch.randint, torch.randint_like}
_COINS = {torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_}
_DRAWS = _NUMBERS | _INTEGERS | _COINS


class HostDraws(TorchFunctionMode):
    """Within, all that code of `model` draws follows from `seed`, and Python's and numpy's generators are the caller's
    again behind it.

    Attributes:
        drew: the code has drawn on the host.
    """

    def __init__(self, model: nn.Module, seed: int, extreme: Extreme | None) -> None:
        super().__init__()
        self.drew = False
        self._seed, self._extreme, self._generators = seed, extreme, Generators([model], "cpu")

    def __enter__(self) -> HostDraws:
        self._restore = self._generators.beyond_torch()
        torch.manual_seed(self._seed)
        self._generators.seed(self._seed)
        if self._extreme is not None:
            first = _WORDS[self._extreme]
            version, words, normal = random.getstate()
            random.setstate((version, (*first, *words[_FIRST:-1], 0), normal))
            state: Any = np.random.get_state()
            np.random.set_state(("MT19937", np.array([*first, *state[1][_FIRST:]], dtype=np.uint32), 0, 0, 0.0))
        if self._extreme == "most":  # Python draws an integer below n from top bits, again until they are below n
            left = iter(range(_FIRST))
            _PYTHON._randbelow = lambda own, n: n - 1 if n and next(left, None) is not None else _BELOW(own, n)
        self._before = _states()
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in _DRAWS or not isinstance(result, Tensor) or result.numel() != 1:
            return result
        self.drew = True
        if self._extreme is None:
            return result
        most = self._extreme == "most"
        if func in _INTEGERS:
            bounds = [x for x in (*args, kwargs.get("low"), kwargs.get("high")) if isinstance(x, int)]
            low, high = bounds if len(bounds) > 1 else (0, *bounds)
            return result.fill_(high - 1 if most else low)
        return result.fill_(float(most) if func in _COINS else 1 - torch.finfo(result.dtype).eps if most else 0.0)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.drew |= _states() != self._before
        _PYTHON._randbelow = _BELOW
        for set_state in self._restore:
            set_state()


def _states() -> tuple[Any, Any]:
    state: Any = np.random.get_state()
    return random.getstate(), (state[1].tobytes(), state[2])
