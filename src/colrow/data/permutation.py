"""A pseudorandom order of n things, computed element by element: no list of n numbers is kept.

A Feistel network permutes pairs (left, right) of Z_m × Z_m with m = ceil(sqrt(n)): each round is
(l, r) -> (r, l + F(r) mod m), which can be undone whatever F is. Numbers that fall on n or above are sent through
again until they fall below ("cycle walking", Black and Rogaway 2002), which keeps it a permutation of 0 .. n-1.
Since m² - n < 2 sqrt(n) + 1, few numbers need it.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
"""Multipliers of the splitmix64 finaliser."""


class Permutation:
    """A permutation of 0 .. n-1 that `key` chooses. O(1) memory; the same on every machine and numpy."""

    def __init__(self, n: int, key: str) -> None:
        assert 0 < n < 1 << 62
        self.n = n
        self._side = np.uint64(math.isqrt(n - 1) + 1)  # m = ceil(sqrt(n)), exactly
        digests = (hashlib.blake2b(f"{key} {i}".encode(), digest_size=8).digest() for i in range(_ROUNDS))
        self._keys = [np.uint64(int.from_bytes(digest, "little")) for digest in digests]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The number that each of `positions` is mapped to: int64 of any shape, in and out."""
        assert positions.size == 0 or (positions.min() >= 0 and positions.max() < self.n)
        out = self._once(positions.astype(np.uint64))
        while (outside := out >= np.uint64(self.n)).any():
            out[outside] = self._once(out[outside])
        return out.astype(np.int64)

    def _once(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x // self._side, x % self._side
        for key in self._keys:
            left, right = right, (left + _hash(right ^ key) % self._side) % self._side
        return left * self._side + right


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: every bit of the result depends on every bit of `x`. uint64, wraps around."""
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))
